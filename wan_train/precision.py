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

from wan_train.cli import choose
from wan_train.errors import InputError

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

WITHOUT_FLOAT64 = ("mps",)  # kinds of devices on which a tensor of float64 is a TypeError


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


def float64_device(device: torch.device) -> torch.device:
    """Where to do float64 arithmetic for tensors on `device`: there, or on the CPU if the device has no float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def default_device(name: str | None = None) -> torch.device:
    """The named device, or the first accelerator there is, or the CPU. InputError for one that is not there."""
    if not name:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"--device {name} is not available: leave it out, or give cpu or cuda") from None
    return device


class Linear(nn.Linear):
    """A Linear that computes in its input's dtype, whatever its weights are stored in.

    `scale_weight`, where something has set it, is what one step of the stored numbers counts; see `widened`.
    """

    scale_weight: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("scale_weight", None)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if _is_large_for(self.weight, x) and self.scale_weight is None:
            return NarrowProduct.apply(x, self.weight, bias)  # type: ignore[no-untyped-call]
        if self.weight.dtype == x.dtype or self.weight.requires_grad or (bias is not None and bias.requires_grad):
            return F.linear(x, self.weight.to(x.dtype), bias)
        return FrozenProduct.apply(x, self.weight, self.scale_weight, bias)  # type: ignore[no-untyped-call]


class Conv2d(nn.Conv2d):
    """A Conv2d that computes in its input's dtype, whatever its weights are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self.weight.to(x.dtype), bias)


_CHUNK = 2**22  # numbers that are widened at once in float32: 16 MB


def widened(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A stored matrix (out, in) in `dtype`: its numbers times `scale` (out or 1, groups, 1) float32, each group of
    in/groups inputs with its own; the product is taken in float32 and rounded once. `scale` None: as stored."""
    if scale is None:
        return _looked_up(weight).to(dtype)
    if dtype is torch.float32 or weight.numel() <= _CHUNK or torch.compiler.is_compiling():
        return _scaled(weight, scale).to(dtype)
    wide = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    rows = max(1, _CHUNK // weight.shape[1])
    scales = scale.expand(len(weight), -1, -1)
    for some, numbers, scaling in zip(wide.split(rows), weight.split(rows), scales.split(rows), strict=True):
        some.copy_(_scaled(numbers, scaling))
    return wide


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    wide = _looked_up(weight).to(torch.float32, copy=weight.dtype is torch.float32)
    return wide.unflatten(1, (scale.shape[1], -1)).mul_(scale).flatten(1)


def _looked_up(codes: Tensor) -> Tensor:
    """Floats of 8 bits in float32 by a table of all 256, five times faster than a cast on a CPU; others as are."""
    narrow = codes.is_floating_point() and codes.itemsize == 1
    if not narrow or codes.device.type != "cpu" or torch.compiler.is_compiling():
        return codes
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    return table.index_select(0, codes.view(torch.uint8).int().flatten()).view(codes.shape)


class InputGradient(torch.autograd.Function):
    """The gradient of x W^T + b with respect to x, exact for the stored W, which `forward` saves with its scale: a
    rounding of x counts as none. W is widened again here: autograd would keep the wide copy until then."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        return grad @ widened(weight, scale, grad.dtype), None, None, None


class FrozenProduct(InputGradient):
    """x W^T + b with a frozen W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, widened(weight, scale, x.dtype), bias)


_FEW_ROWS = 256  # of an input: a product with so few costs little more than reading its matrix


def _is_large_for(weight: Tensor, x: Tensor) -> bool:
    """Whether a matrix, made float32 as x is, would be much beside a product with so few rows: that of the DiT's
    `time_projection` is 630 MB in the 14B model, for one row or one for each latent frame."""
    few = x.dtype is torch.float32 and x.ndim > 1 and x.numel() <= _FEW_ROWS * x.shape[-1]
    return few and weight.itemsize < x.itemsize and weight.numel() > _CHUNK and not torch.compiler.is_compiling()


class NarrowProduct(torch.autograd.Function):
    """x W^T + b, x (..., in) and W (out, in), with a few rows of W in x's dtype at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = torch.cat([F.linear(x, widened(weight[rows], None, x.dtype)) for rows in _some_rows(weight)], dim=-1)
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        x_grad = torch.zeros_like(x) if for_x else None
        weight_grad = torch.empty_like(weight) if for_weight else None
        for rows in _some_rows(weight):
            some = grad[..., rows]
            if x_grad is not None:
                x_grad += some @ widened(weight[rows], None, grad.dtype)
            if weight_grad is not None:
                weight_grad[rows] = some.flatten(0, -2).T @ x.flatten(0, -2)
        return x_grad, weight_grad, grad.flatten(0, -2).sum(0) if for_bias else None


def _some_rows(weight: Tensor) -> list[slice]:
    count = max(1, _CHUNK // weight.shape[1])
    return [slice(start, start + count) for start in range(0, len(weight), count)]


class _BlockLinear(nn.Linear):
    """A Linear that widens its matrix when it multiplies, by `scale_weight` where something has set that.

    On a CPU it takes a few rows at a time, so that each wide block is still in the processor's cache when it is
    multiplied: as fast as if the matrix had been stored in the input's dtype.
    """

    block_size = 2**21  # numbers: 8 MB in float32
    scale_weight: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        on_cpu = self.weight.device.type == "cpu"
        rows = max(1, self.block_size // self.in_features) if on_cpu else self.out_features
        blocks = self.weight.split(rows)
        scale = self.scale_weight
        scales = [None] * len(blocks) if scale is None else scale.expand(self.out_features, -1, -1).split(rows)
        parts = zip(blocks, scales, strict=True)
        y = torch.cat([F.linear(x, widened(block, some, x.dtype)) for block, some in parts], dim=-1)
        return y if self.bias is None else y + self.bias


class _RowEmbedding(nn.Embedding):
    """An Embedding that casts the rows that were asked for, and brings them to where the ids are, never the table."""

    compute_dtype: torch.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids.to(self.weight.device)).to(ids.device, self.compute_dtype)


def take_rows(table: nn.Embedding, dtype: torch.dtype) -> None:
    """Let a foreign Embedding give rows in `dtype` on the ids' device, wherever and in whatever dtype it is stored."""
    table.__class__ = _RowEmbedding
    cast(_RowEmbedding, table).compute_dtype = dtype


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
                if "scale_weight" not in part._buffers:
                    part.register_buffer("scale_weight", None)
            elif isinstance(part, nn.Embedding) and type(part) in (nn.Embedding, _RowEmbedding):
                take_rows(part, dtype)
            else:
                parametrize.register_parametrization(part, name, _Upcast(dtype), unsafe=True)
