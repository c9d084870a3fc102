"""Store the matrices of frozen Linears in 8 bits.

A scheme defines how a matrix is quantised to codes with scales, and which Linear multiplies by them. Weights are
quantised while they are loaded (`quantised`) into a model on the meta device that has been prepared by `install`; the
Linears accept inputs and return outputs in any floating dtype.

Legend: x (..., in), weight (out, in), scale (out or 1, groups, 1) float32, one per group of in/groups inputs.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_train.errors import InputError
from wan_train.precision import InputGradient, Linear

FP8 = torch.float8_e4m3fn
BLOCK = 64  # inputs that share a scale
SMALLEST_SCALE = 1e-8
_CANDIDATES = 8  # candidate scales per group
_AT_ONCE = 2**20  # elements processed at once
SCALE = "scale_weight"  # name of the buffer, as in musubi-tuner


@dataclass(frozen=True)
class Codes:
    """A quantised matrix and its scale."""

    weight: Tensor
    scale: Tensor | None


@dataclass(frozen=True)
class Scheme:
    """A storage format: a function from a float32 matrix (out, in) to Codes, and the Linear that multiplies by them."""

    quantise: Callable[[Tensor], Codes]
    linear: type[Linear]


def cast_fp8(weight: Tensor) -> Codes:
    """Cast to e4m3 without a scale; saturates at 448."""
    return Codes(_to_fp8(torch.nan_to_num(weight)), None)


def quantise_blocks(weight: Tensor) -> Codes:
    """Quantise to e4m3 with a scale per output and 64 inputs, or per output if 64 does not divide the inputs.

    The scale is max|w|/448 times the power of 2^(1/8), below 2, that minimises the group's squared error. The relative
    error of e4m3 depends only on a value's position between two powers of two, so one of eight scales fits a group of
    64 better: about an eighth less error than with max|w|/448.
    """
    groups = weight.shape[1] // BLOCK if weight.shape[1] % BLOCK == 0 else 1
    rows = max(1, _AT_ONCE // weight.shape[1])
    parts = [_fitted(some.unflatten(1, (groups, -1))) for some in torch.nan_to_num(weight.float()).split(rows)]
    return Codes(
        torch.cat([p.weight for p in parts]).flatten(1), torch.cat([p.scale for p in parts if p.scale is not None])
    )


def _fitted(groups: Tensor) -> Codes:
    """Return codes of groups (rows, groups, n) with the best of the candidate scales."""
    smallest = _largest(groups, 448.0)
    best, least = smallest, torch.full_like(smallest, math.inf)
    for step in range(_CANDIDATES):
        factor = 2 ** (step / _CANDIDATES)
        numbers = groups / (smallest * factor)
        # In units of `smallest`; the error of subnormals is negligible.
        error = _round_mantissa(numbers).sub_(numbers).square_().sum(dim=-1, keepdim=True).mul_(factor**2)
        better = error < least
        best, least = torch.where(better, smallest * factor, best), torch.where(better, error, least)
    return Codes(_to_fp8(groups / best), best)


def _round_mantissa(numbers: Tensor) -> Tensor:
    """Round float32 values to the 4 significant bits of e4m3, six times faster than with a cast and back."""
    return numbers.view(torch.int32).add(0x80000).bitwise_and_(-0x100000).view(torch.float32)


def quantise_rows(weight: Tensor) -> Codes:
    """Quantise to e4m3 with a scale of max|w|/448 per output, as fp8 matrix products require."""
    return _scale_to(weight, 448.0, _to_fp8)


def quantise_int8(weight: Tensor) -> Codes:
    """Quantise to int8 with a scale of max|w|/127 per output, symmetric about zero."""
    return _scale_to(weight, 127.0, _to_int8)


def _scale_to(weight: Tensor, largest: float, cast: Callable[[Tensor], Tensor]) -> Codes:
    wide = torch.nan_to_num(weight.float()).unsqueeze(1)
    scale = _largest(wide, largest)
    return Codes(cast(wide / scale).flatten(1), scale)


def _largest(numbers: Tensor, code: float) -> Tensor:
    """Return the scale that maps the largest magnitude along the last axis to `code`."""
    return (numbers.abs().amax(dim=-1, keepdim=True) / code).clamp_(min=SMALLEST_SCALE)


def _to_fp8(numbers: Tensor) -> Tensor:
    # Clamped first, because whether a cast saturates or returns NaN depends on the device.
    return numbers.clamp(-448.0, 448.0).to(FP8)


def _to_int8(numbers: Tensor) -> Tensor:
    return numbers.round().clamp_(-127, 127).to(torch.int8)


class _QuantisedLinear(Linear):
    """A frozen Linear with a quantised weight, multiplied by `product`."""

    product: type[torch.autograd.Function]

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.product.apply(x, self.weight, self.scale_weight, bias)


class _Int8Product(InputGradient):
    """x W^T + b in int8: x is quantised per token, sums are int32.

    This is W8A8 as in LLM.int8()'s vector-wise form (Dettmers et al. 2022, eq. 7), without its outlier columns.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        tokens, steps = _rounded_rows(x, 127.0, _to_int8)
        sums = torch._int_mm(_padded(tokens), weight.t())[: len(tokens)]
        return _unscaled(sums, steps, scale, bias, x)


class _Fp8Product(InputGradient):
    """x W^T + b in e4m3 with a scale per token and per output, with the device's fp8 matrix product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        tokens, steps = _rounded_rows(x, 448.0, _to_fp8)
        columns = scale.view(-1, 1).expand(len(weight), 1).t().contiguous()
        # Row-wise scales are supported with a bfloat16 result only.
        y = torch._scaled_mm(tokens, weight.t(), steps, columns, out_dtype=torch.bfloat16)
        y = y.to(x.dtype).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias


def _rounded_rows(x: Tensor, largest: float, cast: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return tokens (rows, in) in 8 bits and the scale of each (rows, 1) float32."""
    rows = x.flatten(0, -2).float()
    steps = _largest(rows, largest)
    return cast(rows / steps), steps


def _padded(tokens: Tensor) -> Tensor:
    """Pad to more than 16 rows on CUDA, which int8 products require there."""
    return F.pad(tokens, (0, 0, 0, 32 - len(tokens))) if tokens.is_cuda and len(tokens) <= 16 else tokens


def _unscaled(sums: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    y = sums.float().mul_(steps).mul_(scale.view(1, -1)).to(x.dtype).unflatten(0, x.shape[:-1])
    return y if bias is None else y.add_(bias)


class Int8Linear(_QuantisedLinear):
    """A Linear that multiplies in int8."""

    product = _Int8Product


class Fp8Linear(_QuantisedLinear):
    """A Linear that multiplies in fp8."""

    product = _Fp8Product


SCHEMES: dict[str, Scheme] = {
    "fp8": Scheme(cast_fp8, Linear),
    "fp8_scaled": Scheme(quantise_blocks, Linear),
    "fp8_fast": Scheme(quantise_rows, Fp8Linear),
    "int8": Scheme(quantise_int8, Int8Linear),
}
# Both sides of a matrix must be multiples of this for 8-bit matrix products.
MULTIPLES = {"fp8_fast": 16, "int8": 8}


def check_fp8_product(device: torch.device) -> None:
    """Raise InputError unless a test shows that `device` supports e4m3 matrix products."""
    codes = torch.zeros(32, 32, device=device).to(FP8)
    ones = torch.ones(32, 1, device=device)
    try:
        torch._scaled_mm(codes, codes.t(), ones, ones.t().contiguous(), out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError) as problem:
        reason = str(problem).splitlines()[0]
        raise InputError(
            f"--fp8_fast: {device} does not support fp8 matrix products ({reason}): omit the option"
        ) from None


def trial_linear(name: str, device: torch.device) -> Linear:
    """Return a small frozen Linear, 64 to 64, stored as the scheme `name` stores matrices, for trying on a device."""
    scheme = SCHEMES[name]
    codes = scheme.quantise(torch.eye(BLOCK, device="cpu"))
    linear = scheme.linear(BLOCK, BLOCK).requires_grad_(False)
    linear.weight.data = codes.weight
    linear.scale_weight = codes.scale
    return linear.to(device)


def quantised(
    tensors: Iterable[tuple[str, Tensor]], plan: Mapping[str, Scheme], device: torch.device | str
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors with `M.weight` of each module M of the plan as codes, followed by `M.scale_weight`."""
    for name, tensor in tensors:
        module = name.removesuffix(".weight")
        if name == module or module not in plan:
            yield name, tensor
            continue
        codes = plan[module].quantise(tensor.to(device, torch.float32))
        yield name, codes.weight
        if codes.scale is not None:
            yield f"{module}.{SCALE}", codes.scale


def install(model: nn.Module, linears: Mapping[str, type[Linear]], scales: Mapping[str, tuple[int, ...]]) -> None:
    """Set the classes of the named Linears of a model on the meta device, and register scales of these shapes."""
    for name, kind in linears.items():
        model.get_submodule(name).__class__ = kind
    for name, shape in scales.items():
        model.get_submodule(name).scale_weight = torch.empty(shape, device="meta")


def scale_shape(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape (out, groups, 1) of the scheme's scales for a matrix of this shape; None without scales."""
    # Tested on one row, because quantising hundreds of whole matrices would take long.
    scale = scheme.quantise(torch.zeros(1, shape[1], device="cpu")).scale
    return None if scale is None else (shape[0], *scale.shape[1:])
