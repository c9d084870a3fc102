"""Keeping the matrices of frozen Linears in 8 bits.

A scheme says how a matrix is turned into codes with their scales, and by which Linear they are multiplied. Weights are
quantised while they stream by (`quantised`), into a model made on `meta` whose Linears were told what comes
(`install`); what computes with them takes inputs and returns outputs in any floating dtype.

Legend: x (..., in), weight (out, in), scale (out or 1, groups, 1) float32, each group of in/groups inputs with its own.
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
_CANDIDATES = 8  # scales that are tried for each group
_AT_ONCE = 2**20  # numbers for which they are tried at once
SCALE = "scale_weight"  # the buffer's name, as musubi-tuner has it


@dataclass(frozen=True)
class Codes:
    """A quantised matrix."""

    weight: Tensor
    scale: Tensor | None


@dataclass(frozen=True)
class Scheme:
    """A way to store a matrix: float32 (out, in) -> Codes, and the Linear that multiplies by them."""

    quantise: Callable[[Tensor], Codes]
    linear: type[Linear]


def cast_fp8(weight: Tensor) -> Codes:
    """e4m3 without a scale; beyond 448 it saturates."""
    return Codes(_to_fp8(torch.nan_to_num(weight)), None)


def quantise_blocks(weight: Tensor) -> Codes:
    """e4m3 with a scale for every 64 inputs of an output, or for each output where 64 does not divide.

    The scale is max|w|/448 times that power of 2^(1/8) below 2 with which the group's squared error is least. Rounding
    to e4m3 errs alike at every magnitude but for where a number lies between two powers of two, and a group of 64 lies
    luckier with one of eight scales: about an eighth less error than with max|w|/448 alone.
    """
    groups = weight.shape[1] // BLOCK if weight.shape[1] % BLOCK == 0 else 1
    rows = max(1, _AT_ONCE // weight.shape[1])
    parts = [_fitted(some.unflatten(1, (groups, -1))) for some in torch.nan_to_num(weight.float()).split(rows)]
    return Codes(
        torch.cat([p.weight for p in parts]).flatten(1), torch.cat([p.scale for p in parts if p.scale is not None])
    )


def _fitted(groups: Tensor) -> Codes:
    """Codes of groups (rows, groups, n) by the best of the candidates for their scale."""
    smallest = _largest(groups, 448.0)
    best, least = smallest, torch.full_like(smallest, math.inf)
    for step in range(_CANDIDATES):
        factor = 2 ** (step / _CANDIDATES)
        numbers = groups / (smallest * factor)
        # In units of `smallest`; what lies below e4m3's normal numbers errs too little to matter.
        error = _round_mantissa(numbers).sub_(numbers).square_().sum(dim=-1, keepdim=True).mul_(factor**2)
        better = error < least
        best, least = torch.where(better, smallest * factor, best), torch.where(better, error, least)
    return Codes(_to_fp8(groups / best), best)


def _round_mantissa(numbers: Tensor) -> Tensor:
    """float32 values rounded to the four significant bits of e4m3, six times faster than by a cast there and back."""
    return numbers.view(torch.int32).add(0x80000).bitwise_and_(-0x100000).view(torch.float32)


def quantise_rows(weight: Tensor) -> Codes:
    """e4m3 with a scale of max|w|/448 for each output, as fp8 products take it."""
    return _scale_to(weight, 448.0, _to_fp8)


def quantise_int8(weight: Tensor) -> Codes:
    """int8 with a scale of max|w|/127 for each output, symmetric about zero."""
    return _scale_to(weight, 127.0, _to_int8)


def _scale_to(weight: Tensor, largest: float, cast: Callable[[Tensor], Tensor]) -> Codes:
    wide = torch.nan_to_num(weight.float()).unsqueeze(1)
    scale = _largest(wide, largest)
    return Codes(cast(wide / scale).flatten(1), scale)


def _largest(numbers: Tensor, code: float) -> Tensor:
    """The scale with which the largest magnitude along the last axis becomes `code`."""
    return (numbers.abs().amax(dim=-1, keepdim=True) / code).clamp_(min=SMALLEST_SCALE)


def _to_fp8(numbers: Tensor) -> Tensor:
    # Clamped first: whether a cast saturates or gives NaN depends on the device.
    return numbers.clamp(-448.0, 448.0).to(FP8)


def _to_int8(numbers: Tensor) -> Tensor:
    return numbers.round().clamp_(-127, 127).to(torch.int8)


class _QuantisedLinear(Linear):
    """A Linear whose weight is codes: it is frozen, and its products are `product`'s."""

    product: type[torch.autograd.Function]

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.product.apply(x, self.weight, self.scale_weight, bias)


class _Int8Product(InputGradient):
    """x W^T + b in int8: x is rounded to int8 with a scale for each token, sums are int32 (W8A8 as in LLM.int8()'s
    vector-wise form, Dettmers et al. 2022, eq. 7, without its outlier columns)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        tokens, steps = _rounded_rows(x, 127.0, _to_int8)
        sums = torch._int_mm(_padded(tokens), weight.t())[: len(tokens)]
        return _unscaled(sums, steps, scale, bias, x)


class _Fp8Product(InputGradient):
    """x W^T + b in e4m3 with a scale for each token and each output, by the device's own fp8 product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        tokens, steps = _rounded_rows(x, 448.0, _to_fp8)
        columns = scale.view(-1, 1).expand(len(weight), 1).t().contiguous()
        # Row-wise scales are to be had with a bfloat16 result only.
        y = torch._scaled_mm(tokens, weight.t(), steps, columns, out_dtype=torch.bfloat16)
        y = y.to(x.dtype).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias


def _rounded_rows(x: Tensor, largest: float, cast: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens (rows, in) in 8 bits and what one step of each counts (rows, 1) float32."""
    rows = x.flatten(0, -2).float()
    steps = _largest(rows, largest)
    return cast(rows / steps), steps


def _padded(tokens: Tensor) -> Tensor:
    """CUDA multiplies more than 16 rows of int8, a CPU any number."""
    return F.pad(tokens, (0, 0, 0, 32 - len(tokens))) if tokens.is_cuda and len(tokens) <= 16 else tokens


def _unscaled(sums: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    y = sums.float().mul_(steps).mul_(scale.view(1, -1)).to(x.dtype).unflatten(0, x.shape[:-1])
    return y if bias is None else y.add_(bias)


class Int8Linear(_QuantisedLinear):
    """Multiplies in int8."""

    product = _Int8Product


class Fp8Linear(_QuantisedLinear):
    """Multiplies in fp8."""

    product = _Fp8Product


SCHEMES: dict[str, Scheme] = {
    "fp8": Scheme(cast_fp8, Linear),
    "fp8_scaled": Scheme(quantise_blocks, Linear),
    "fp8_fast": Scheme(quantise_rows, Fp8Linear),
    "int8": Scheme(quantise_int8, Int8Linear),
}
# What the devices' products in 8 bits ask of both sides of a matrix.
MULTIPLES = {"fp8_fast": 16, "int8": 8}


def check_fp8_product(device: torch.device) -> None:
    """InputError unless `device` multiplies e4m3 matrices, seen by letting it."""
    codes = torch.zeros(32, 32, device=device).to(FP8)
    ones = torch.ones(32, 1, device=device)
    try:
        torch._scaled_mm(codes, codes.t(), ones, ones.t().contiguous(), out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError) as problem:
        reason = str(problem).splitlines()[0]
        raise InputError(
            f"--fp8_fast: {device} does not support fp8 matrix products ({reason}): leave it out"
        ) from None


def quantised(
    tensors: Iterable[tuple[str, Tensor]], plan: Mapping[str, Scheme], device: torch.device | str
) -> Iterator[tuple[str, Tensor]]:
    """A pipe that turns `M.weight` of each module M of the plan into codes and, behind it, `M.scale_weight`."""
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
    """Let the named Linears of a model on `meta` be of these kinds, and expect scales of these shapes."""
    for name, kind in linears.items():
        model.get_submodule(name).__class__ = kind
    for name, shape in scales.items():
        model.get_submodule(name).scale_weight = torch.empty(shape, device="meta")


def scale_shape(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape (out, groups, 1) of the scales that the scheme gives a matrix of this shape; None for none."""
    # Seen on one row, since a model has hundreds of matrices and each would go through all of the arithmetic.
    scale = scheme.quantise(torch.zeros(1, shape[1], device="cpu")).scale
    return None if scale is None else (shape[0], *scale.shape[1:])
