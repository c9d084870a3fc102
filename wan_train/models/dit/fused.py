"""The work of a block between its matrix products and attention, as pure functions that compile to one kernel each.

Separate operators read and write all tokens once per operation; memory traffic, not arithmetic, is their cost. Each
function of `PURE` reads its inputs once and writes its results once when it is compiled, which `wan_train.fusing` does.
`Fused` calls them in autograd's forward and backward passes.

Legend: B batch, L tokens, N heads, D head width, d = N*D token width, G groups of equally many tokens that share one
modulation. `scale`, `shift` and `gate` are (B, G, d); a learned weight and bias are (1, 1, d), with G = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wan_train.models.dit.elementwise import PLAIN, Modulation
from wan_train.models.dit.norms import LayerNorm
from wan_train.models.dit.norms import norm_rope as plain_norm_rope


def norm_and_rotate(
    x: Tensor, weight: Tensor, rope: Tensor | None, eps: float, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Return the RMS norm of x (B, L, d), rotated if `rope` (2, L, 1, D) is given, as (B, L, N, D), and 1 / rms."""
    wide = x.float()
    inverse = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    heads = (wide * inverse * weight.float()).unflatten(-1, (num_heads, -1))
    if rope is not None:
        heads = heads * rope[0] + _swapped(heads) * rope[1]
    return heads.to(x.dtype), inverse


def norm_and_rotate_backward(grad: Tensor, x: Tensor, weight: Tensor, rope: Tensor | None, inverse: Tensor) -> Tensor:
    """Return the gradient of x, from that of the heads (B, L, N, D)."""
    heads = grad.float()
    if rope is not None:
        heads = heads * rope[0] - _swapped(heads) * rope[1]
    wide = heads.flatten(-2) * weight.float()
    normed = x.float() * inverse
    share = (wide * normed).mean(dim=-1, keepdim=True)
    return ((wide - normed * share) * inverse).to(x.dtype)


def normalise(x: Tensor, scale: Tensor, shift: Tensor, added: float, eps: float, dtype: torch.dtype) -> list[Tensor]:
    """Return layer_norm(x) * (scale + added) + shift in `dtype`, and the mean and 1 / deviation (B, L, 1) of x."""
    wide = x.float()
    mean = wide.mean(dim=-1, keepdim=True)
    inverse = ((wide - mean).square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    normed = _grouped((wide - mean) * inverse, scale)
    out = normed * _each(scale.float() + added) + _each(shift.float())
    return [out.view(x.shape).to(dtype), mean, inverse]


def normalise_backward(grad: Tensor, x: Tensor, scale: Tensor, added: float, mean: Tensor, inverse: Tensor) -> Tensor:
    """Return the gradient of x in float32."""
    wide = (_grouped(grad.float(), scale) * _each(scale.float() + added)).view(x.shape)
    normed = (x.float() - mean) * inverse
    share = (wide * normed).mean(dim=-1, keepdim=True)
    return (wide - wide.mean(dim=-1, keepdim=True) - normed * share) * inverse


def add(x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    """Return x + update * gate in float32, or x + update."""
    if gate is None:
        return x + update.float()
    return x + (_grouped(update.float(), gate) * _each(gate)).view(x.shape)


def add_backward(grad: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the gradient of `update`, which has this dtype; that of x is `grad` itself."""
    return grad.to(dtype) if gate is None else (_grouped(grad, gate) * _each(gate)).view(grad.shape).to(dtype)


def add_normalise(
    x: Tensor,
    update: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    added: float,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return `add` of the first three arguments, then `normalise` of that sum."""
    total = add(x, update, gate)
    return [total, *normalise(total, scale, shift, added, eps, dtype)]


def add_normalise_backward(
    grad_total: Tensor,
    grad: Tensor,
    total: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    added: float,
    mean: Tensor,
    inverse: Tensor,
) -> list[Tensor]:
    """Return the gradients of x in float32 and of `update` in the dtype of `grad`."""
    grad_x = grad_total + normalise_backward(grad, total, scale, added, mean, inverse)
    return [grad_x, add_backward(grad_x, gate, grad.dtype)]


def _swapped(heads: Tensor) -> Tensor:
    """Return (..., D) with the elements of each adjacent pair exchanged."""
    return heads.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _grouped(x: Tensor, like: Tensor) -> Tensor:
    """Return x (B, L, d) as (B, G, L/G, d)."""
    return x.unsqueeze(1) if like.shape[1] == 1 else x.unflatten(1, (like.shape[1], -1))


def _each(values: Tensor) -> Tensor:
    return values.unsqueeze(2)


@dataclass(frozen=True)
class Kernels:
    """The functions of this module, as they are (`PURE`) or compiled."""

    norm_and_rotate: Callable[..., tuple[Tensor, Tensor]] = norm_and_rotate
    norm_and_rotate_backward: Callable[..., Tensor] = norm_and_rotate_backward
    normalise: Callable[..., list[Tensor]] = normalise
    normalise_backward: Callable[..., Tensor] = normalise_backward
    add: Callable[..., Tensor] = add
    add_backward: Callable[..., Tensor] = add_backward
    add_normalise: Callable[..., list[Tensor]] = add_normalise
    add_normalise_backward: Callable[..., list[Tensor]] = add_normalise_backward

    def each(self, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> "Kernels":
        """Return these functions, each replaced by `change` of it."""
        return Kernels(**{field.name: change(getattr(self, field.name)) for field in fields(self)})


PURE = Kernels()


class Fused:
    """`Elementwise`, and `norm_rope`, by `kernels`.

    What learns besides x and the updates, as in full fine-tuning, has gradients that are sums over tokens: these cases
    are left to torch's operators.
    """

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def norm_rope(self, x: Tensor, weight: Tensor, rope: Tensor | None, eps: float, num_heads: int) -> Tensor:
        """Return the RMS norm (B, L, N, D) of x (B, L, N*D), rotated by `rope` if given; see `RMSNorm`."""
        if _learns(weight):
            return plain_norm_rope(x, weight, rope, eps, num_heads)
        heads: Tensor = _NormRope.apply(self.kernels, x, weight, rope, eps, num_heads)  # type: ignore[no-untyped-call]
        return heads

    def normalise(self, x: Tensor, norm: LayerNorm, modulation: Modulation | None, dtype: torch.dtype) -> Tensor:
        """Return the modulated norm of x in `dtype`."""
        affine = _Affine.of(norm, modulation)
        if _learns(affine.scale, affine.shift):
            return PLAIN.normalise(x, norm, modulation, dtype)
        normed: Tensor = _Normalise.apply(self.kernels, x, affine, dtype)  # type: ignore[no-untyped-call]
        return normed

    def add(self, x: Tensor, update: Tensor, gate: Tensor | None, *, own: bool = False) -> Tensor:
        """Return x + update * gate, or x + update, in float32, with gate (B, G, d)."""
        if _learns(gate):
            return PLAIN.add(x, update, gate, own=own)
        total: Tensor = _Add.apply(self.kernels, x, update, gate)  # type: ignore[no-untyped-call]
        return total

    def add_normalise(
        self,
        x: Tensor,
        update: Tensor,
        gate: Tensor | None,
        norm: LayerNorm,
        modulation: Modulation | None,
        dtype: torch.dtype,
        *,
        own: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return `add` of x, and `normalise` of the sum."""
        affine = _Affine.of(norm, modulation)
        if _learns(gate, affine.scale, affine.shift) or update.dtype is not dtype:
            return PLAIN.add_normalise(x, update, gate, norm, modulation, dtype, own=own)
        pair: tuple[Tensor, Tensor] = _AddNormalise.apply(self.kernels, x, update, gate, affine)  # type: ignore[no-untyped-call]
        return pair


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@dataclass(frozen=True)
class _Affine:
    """layer_norm(x) * (scale + added) + shift with scale and shift (B, G, d): a modulation or learned weights."""

    scale: Tensor
    shift: Tensor
    added: float
    eps: float

    @classmethod
    def of(cls, norm: LayerNorm, modulation: Modulation | None) -> "_Affine":
        if modulation is not None:
            assert norm.weight is None, "a norm has its own scale or a modulation"
            return cls(modulation.scale, modulation.shift, 1.0, norm.eps)
        return cls(norm.weight.view(1, 1, -1), norm.bias.view(1, 1, -1), 0.0, norm.eps)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, x: Tensor, weight: Tensor, rope: Tensor | None, eps: float, num_heads: int
    ) -> Tensor:
        heads, inverse = kernels.norm_and_rotate(x, weight, rope, eps, num_heads)
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, rope, inverse)
        return heads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.kernels.norm_and_rotate_backward(grad, *ctx.saved_tensors), None, None, None, None


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, affine: _Affine, dtype: torch.dtype) -> Tensor:
        normed, mean, inverse = kernels.normalise(x, affine.scale, affine.shift, affine.added, affine.eps, dtype)
        ctx.kernels, ctx.added = kernels, affine.added
        ctx.save_for_backward(x, affine.scale, mean, inverse)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, inverse = ctx.saved_tensors
        return None, ctx.kernels.normalise_backward(grad, x, scale, ctx.added, mean, inverse), None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
        ctx.kernels, ctx.dtype = kernels, update.dtype
        ctx.save_for_backward(gate)
        return kernels.add(x, update, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gate,) = ctx.saved_tensors
        return None, grad, ctx.kernels.add_backward(grad, gate, ctx.dtype), None


class _AddNormalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, x: Tensor, update: Tensor, gate: Tensor | None, affine: _Affine
    ) -> tuple[Tensor, Tensor]:
        total, normed, mean, inverse = kernels.add_normalise(
            x, update, gate, affine.scale, affine.shift, affine.added, affine.eps, update.dtype
        )
        ctx.kernels, ctx.added = kernels, affine.added
        ctx.save_for_backward(total, gate, affine.scale, mean, inverse)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, gate, scale, mean, inverse = ctx.saved_tensors
        backward = ctx.kernels.add_normalise_backward
        grad_x, grad_update = backward(grad_total, grad, total, gate, scale, ctx.added, mean, inverse)
        return None, grad_x, grad_update, None, None
