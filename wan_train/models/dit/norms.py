"""Normalisation layers with float32 statistics.

RMS norm and rotary embedding are fused in one autograd function: as separate operations they read and write the queries
and keys a dozen times, which is the largest cost of a block after its matrix products.

Legend: B batch, L tokens, N heads, D head width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from wan_train.models.dit.rope import rotate

NormRope = Callable[[Tensor, Tensor, Tensor | None, float, int], Tensor]


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed and returned in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the whole width (Zhang and Sennrich 2019), returned in the input's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.norm_rope: NormRope = norm_rope

    def forward(self, x: Tensor, num_heads: int, rope: Tensor | None = None) -> Tensor:
        """Return (B, L, N, D) of x (B, L, N*D), with each token rotated by `rope` (2, L, 1, D) if given."""
        return self.norm_rope(x, self.weight, rope, self.eps, num_heads)


def norm_rope(x: Tensor, weight: Tensor, rope: Tensor | None, eps: float, num_heads: int) -> Tensor:
    """Return the RMS norm (B, L, N, D) of x (B, L, N*D), rotated by `rope` if given; see `RMSNorm`."""
    heads: Tensor = _NormRope.apply(x, weight, rope, eps, num_heads)  # type: ignore[no-untyped-call]
    return heads


class _NormRope(torch.autograd.Function):
    """RMS norm over the width, then rotary embedding of the heads; the norm's factor is folded into the rope table."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rope: Tensor | None, eps: float, num_heads: int) -> Tensor:
        wide = x.float()
        inverse = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_() / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rope, inverse)
        heads = (wide * weight.float()).unflatten(-1, (num_heads, -1))
        factor = inverse.unsqueeze(-1)
        if rope is None:
            return heads.mul_(factor).to(x.dtype)
        return rotate(heads, rope[0] * factor, rope[1] * factor).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight, rope, inverse = ctx.saved_tensors
        grad = grad.float()
        grad = (rotate(grad, rope[0], -rope[1]) if rope is not None else grad).flatten(-2)
        normed = x.float() * inverse
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        # Memory of this function is used again: on a CPU, new memory costs as much as the operations.
        grad = grad.mul_(weight.float()) if rope is not None else grad * weight.float()
        share = (grad * normed).mean(dim=-1, keepdim=True)
        return grad.sub_(normed.mul_(share)).mul_(inverse).to(x.dtype), grad_weight, None, None, None
