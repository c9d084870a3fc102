"""A small model whose Linears are named as in a Wan DiT."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.deltas.lora import LoraDelta
from wan_train.precision import Linear


class Attention(nn.Module):
    def __init__(self, dim: int, *, image: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.k_img, self.v_img = (Linear(dim, dim) if image else None for _ in range(2))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(self.q(x), self.k(context), self.v(context))
        if self.k_img is not None and self.v_img is not None:
            out = out + F.scaled_dot_product_attention(self.q(x), self.k_img(context), self.v_img(context))
        return self.o(out)


class Block(nn.Module):
    def __init__(self, dim: int, ffn: int, *, image: bool) -> None:
        super().__init__()
        self.self_attn = Attention(dim, image=False)
        self.cross_attn = Attention(dim, image=image)
        self.ffn = nn.Sequential(Linear(dim, ffn), nn.GELU("tanh"), Linear(ffn, dim))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.self_attn(x, x)
        x = x + self.cross_attn(x, context)
        return x + self.ffn(x)


class Model(nn.Module):
    """Two blocks between two Linears that LoRA leaves alone: (B, L, dim), (B, T, dim) -> (B, L, dim)."""

    def __init__(self, dim: int = 8, ffn: int = 12, *, image: bool = False) -> None:
        super().__init__()
        self.text_embedding = nn.Sequential(Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, ffn, image=image) for _ in range(2))
        self.head = nn.ModuleDict({"head": Linear(dim, dim)})

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        context = self.text_embedding(context)
        for block in self.blocks:
            x = block(x, context)
        return self.head["head"](x)


@pytest.fixture
def make_model() -> Callable[..., Model]:
    def make(**kwargs: int | bool) -> Model:
        torch.manual_seed(0)
        return Model(**kwargs)  # type: ignore[arg-type]

    return make


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)


@pytest.fixture
def make_deltas() -> Callable[..., dict[str, LoraDelta]]:
    """Random pairs for every Linear inside the blocks of a model."""

    def make(model: nn.Module, *, rank: int = 3, alpha: float = 2.0, seed: int = 0) -> dict[str, LoraDelta]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: LoraDelta(
                torch.randn(rank, linear.in_features, generator=generator),
                torch.randn(linear.out_features, rank, generator=generator) / 10,
                alpha / rank,
            )
            for name, linear in model.named_modules()
            if name.startswith("blocks.") and isinstance(linear, nn.Linear)
        }

    return make
