"""Names of dtypes, and which dtype to compute in.

Weights may be stored in fewer bits than they compute in: on a CPU bf16 and fp16 weights stay as they are in memory and
every product is taken in float32, since half-precision matrix products are slow and coarse there.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from wan_train.cli import InputError, choose

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
    "no": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def dtype_of(name: str) -> torch.dtype:
    """The dtype behind a name that users write (`bf16`, `bfloat16`, `fp16`, `fp32`, `float`, ...)."""
    return choose("precision", name, DTYPES)


def name_of(dtype: torch.dtype) -> str:
    """torch's own name of a dtype, `bfloat16` for torch.bfloat16, as cache keys carry it."""
    return str(dtype).removeprefix("torch.")


def compute_dtype(device: torch.device | str, stored: torch.dtype) -> torch.dtype:
    """The dtype for products with weights stored as `stored` on `device`: float32 on a CPU, else the stored one."""
    return torch.float32 if torch.device(device).type == "cpu" else stored


def published_dtype(device: torch.device) -> torch.dtype | None:
    """What the official code runs frozen models in on an accelerator, bfloat16; None, the file's own, on a CPU."""
    return None if device.type == "cpu" else torch.bfloat16


def default_device(name: str | None = None) -> torch.device:
    """The named device, or the first accelerator there is, or the CPU. InputError for one that is not there."""
    if not name:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"--device {name} is not there: leave it out, or give cpu or cuda") from None
    return device


class Linear(nn.Linear):
    """A Linear that computes in its input's dtype, whatever its weights are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.weight.dtype == x.dtype or self.weight.requires_grad or (bias is not None and bias.requires_grad):
            return F.linear(x, self.weight.to(x.dtype), bias)
        return _FrozenProduct.apply(x, self.weight, bias)  # type: ignore[no-untyped-call]


class _FrozenProduct(torch.autograd.Function):
    """x W^T + b with a frozen W, cast again for the backward pass: autograd would keep the wide copy until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None


class _BlockLinear(nn.Linear):
    """A Linear that casts its matrix a few rows at a time, so that each cast block is still in the processor's cache
    when it is multiplied: as fast as if the matrix had been stored in the input's dtype."""

    block_size = 2**21  # numbers: 8 MB in float32

    def forward(self, x: Tensor) -> Tensor:
        rows = max(1, self.block_size // self.in_features)
        y = torch.cat([F.linear(x, block.to(x.dtype)) for block in self.weight.split(rows)], dim=-1)
        return y if self.bias is None else y + self.bias


class _RowEmbedding(nn.Embedding):
    """An Embedding that casts the rows that were asked for, never the table."""

    compute_dtype: torch.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).to(self.compute_dtype)


class _Upcast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


def upcast_on_use(module: nn.Module, dtype: torch.dtype) -> None:
    """Let a foreign module, given inputs in `dtype`, compute in it without storing its matrices in it.

    Linears and Embeddings change their class, other matrices are cast whenever they are read, and all keep their dtype
    and name in memory. The rest (norms, biases) is small and is cast here for good.
    """
    for part in list(module.modules()):
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.dtype == dtype:
                continue
            if parameter.ndim < 2:
                parameter.data = parameter.data.to(dtype)
            elif type(part) is nn.Linear:
                part.__class__ = _BlockLinear
            elif type(part) is nn.Embedding:
                part.__class__ = _RowEmbedding
                cast(_RowEmbedding, part).compute_dtype = dtype
            else:
                parametrize.register_parametrization(part, name, _Upcast(dtype), unsafe=True)
