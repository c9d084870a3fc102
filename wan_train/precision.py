"""Names of dtypes, and layers that compute in a different dtype than their weights.

Weights may be stored in fewer bits than they are computed with: on a CPU bf16 and fp16 weights keep their dtype, but
all products are computed in float32, because half-precision matrix products are slow and inaccurate there.
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

WITHOUT_FLOAT64 = ("mps",)  # device types without float64 tensors


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype for a name that users write (`bf16`, `bfloat16`, `fp16`, `fp32`, `float`, ...)."""
    return choose("precision", name, DTYPES)


def name_of(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype, `bfloat16` for torch.bfloat16, as used in cache keys."""
    return str(dtype).removeprefix("torch.")


def compute_dtype(device: torch.device | str, stored: torch.dtype) -> torch.dtype:
    """Return the dtype of products with weights of dtype `stored` on `device`: float32 on a CPU, else `stored`."""
    return torch.float32 if torch.device(device).type == "cpu" else stored


def published_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of frozen models in the official code, bfloat16; None (the file's dtype) on a CPU."""
    return None if device.type == "cpu" else torch.bfloat16


def accumulate_in_float32() -> None:
    """Make matrix products of half-precision tensors sum in float32 on CUDA, for the whole process.

    By default torch allows cuBLAS to add partial sums in bf16 or fp16, which a CPU, where parity is tested, never does.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def float64_device(device: torch.device) -> torch.device:
    """Return where to compute in float64 for tensors on `device`: there, or on the CPU if it has no float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def default_device(name: str | None = None) -> torch.device:
    """Return the named device, or the first accelerator, or the CPU. Raises InputError if it is not available."""
    if not name:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"--device {name} is not available: omit it, or use cpu or cuda") from None
    return device


class Linear(nn.Linear):
    """A Linear that computes in its input's dtype, regardless of the storage dtype of its weights.

    `scale_weight`, if set, is the scale of a quantised weight; see `widened`.
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
    """A Conv2d that computes in its input's dtype, regardless of the storage dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self.weight.to(x.dtype), bias)


_CHUNK = 2**22  # elements that are widened at once in float32: 16 MB


def widened(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a stored matrix (out, in) in `dtype`, multiplied by `scale` (out or 1, groups, 1) float32 if given.

    There is one scale per group of in/groups inputs; the product is computed in float32 and rounded once.
    """
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
    """Convert 8-bit floats to float32 with a lookup table, on CPUs 5 times faster than a cast; others are unchanged."""
    narrow = codes.is_floating_point() and codes.itemsize == 1
    if not narrow or codes.device.type != "cpu" or torch.compiler.is_compiling():
        return codes
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    return table.index_select(0, codes.view(torch.uint8).int().flatten()).view(codes.shape)


class InputGradient(torch.autograd.Function):
    """The gradient of x W^T + b with respect to x, exact for the stored W, which `forward` saves with its scale.

    Rounding of x is ignored (straight-through). W is widened again here, because autograd would keep the wide copy.
    """

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


_FEW_ROWS = 256  # input rows up to which a product costs little more than reading its matrix


def _is_large_for(weight: Tensor, x: Tensor) -> bool:
    """Return whether the float32 copy of a matrix would be large compared to a product with few rows.

    That of the DiT's `time_projection` is 630 MB in the 14B model, for one row, or one per latent frame.
    """
    few = x.dtype is torch.float32 and x.ndim > 1 and x.numel() <= _FEW_ROWS * x.shape[-1]
    return few and weight.itemsize < x.itemsize and weight.numel() > _CHUNK and not torch.compiler.is_compiling()


class NarrowProduct(torch.autograd.Function):
    """x W^T + b, x (..., in) and W (out, in), widening a few rows of W at a time, forward and backward."""

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
    """A Linear that widens its matrix when it multiplies, with `scale_weight` if set.

    On a CPU it widens a few rows at a time, so that each block is still in the processor's cache when it is multiplied:
    as fast as a matrix stored in the input's dtype.
    """

    block_size = 2**21  # elements: 8 MB in float32
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
    """An Embedding that casts and moves only the looked-up rows, never the table."""

    compute_dtype: torch.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids.to(self.weight.device)).to(ids.device, self.compute_dtype)


def take_rows(table: nn.Embedding, dtype: torch.dtype) -> None:
    """Make a foreign Embedding return rows in `dtype` on the ids' device, regardless of its own dtype and device."""
    table.__class__ = _RowEmbedding
    cast(_RowEmbedding, table).compute_dtype = dtype


class _Upcast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


def upcast_on_use(module: nn.Module, dtype: torch.dtype) -> None:
    """Make a foreign module compute in `dtype`, the dtype of its inputs, without storing its matrices in it.

    The class of Linears and Embeddings is replaced, other matrices are cast on each use; all keep their storage dtype
    and name. Other parameters (norms, biases) are small and are cast permanently.
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
