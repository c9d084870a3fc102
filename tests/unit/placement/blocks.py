"""Blocks of a Wan DiT with LoRA branches, and a training step through them."""

import torch
from torch import Tensor, nn

from networks.lora_wan import attach
from networks.settings import NetworkSettings
from wan_train.models.dit.block import Block
from wan_train.models.dit.dit import DitConfig
from wan_train.models.dit.rope import rope_table

GRID = (2, 3, 4)
NUM_TOKENS = 24
CONFIG = DitConfig(dim=32, ffn_dim=192, num_heads=2, num_layers=3)


class Stack(nn.Module):
    """Frozen blocks, with random LoRA branches on all of their Linears."""

    def __init__(self, *, dropout: float = 0.0, config: DitConfig = CONFIG) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers)).requires_grad_(False)
        attach(self, NetworkSettings(network_dim=2, network_dropout=dropout), seed=1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(6)
        context = torch.randn(len(x), 5, self.config.dim, generator=generator)
        time = torch.randn(len(x), 1, 6, self.config.dim, generator=generator)
        frames = x.shape[1] // 12
        rope = rope_table((frames, 3, 4), self.config.dim // self.config.num_heads, device=x.device)
        context = context.to(self.blocks[0].self_attn.q.weight)
        for block in self.blocks:
            x = block(x, context, time.to(x.device), rope)
        return x

    def trained(self) -> list[Tensor]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def tokens(*, seed: int = 7, batch: int = 2, frames: int = 2) -> Tensor:
    """The input of a stack, as it comes from an embedding that is not trained."""
    return torch.randn(batch, frames * 12, CONFIG.dim, generator=torch.Generator().manual_seed(seed))


def step(stack: Stack, *inputs: Tensor) -> list[Tensor]:
    """Outputs and gradients of one backward pass over all inputs."""
    torch.manual_seed(8)
    outputs = [stack(x) for x in inputs]
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    return [*(output.detach() for output in outputs), *take_gradients(stack)]


def take_gradients(stack: Stack) -> list[Tensor]:
    found = []
    for parameter in stack.trained():
        assert parameter.grad is not None
        found.append(parameter.grad)
        parameter.grad = None
    return found
