"""The work of a block between products and attention: norms, modulation, gates and residual sums, in float32.

`PLAIN` computes it with torch's operators. `wan_train.models.dit.fused` has functions that compile to one kernel each.

Legend: B batch, L tokens, d token width, G groups of equally many tokens that share one modulation.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wan_train.models.dit.norms import LayerNorm


@dataclass(frozen=True)
class Modulation:
    """Shift and scale (B, G, d) float32 of normalised tokens: x * (1 + scale) + shift."""

    shift: Tensor
    scale: Tensor


class Elementwise(Protocol):
    """How a block computes what is between its products. Tokens x (B, L, d) are float32, updates of any dtype.

    With `own`, nothing else reads x, so its memory may hold the result where no gradient needs it.
    """

    def normalise(self, x: Tensor, norm: LayerNorm, modulation: Modulation | None, dtype: torch.dtype) -> Tensor:
        """Return the modulated norm of x in `dtype`."""
        ...

    def add(self, x: Tensor, update: Tensor, gate: Tensor | None, *, own: bool = False) -> Tensor:
        """Return x + update * gate, or x + update, in float32, with gate (B, G, d)."""
        ...

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
        ...


class Plain:
    """`Elementwise` with torch's operators."""

    def normalise(self, x: Tensor, norm: LayerNorm, modulation: Modulation | None, dtype: torch.dtype) -> Tensor:
        """Return the modulated norm of x in `dtype`."""
        normed = norm(x)
        if modulation is not None:
            normed = modulate(normed, modulation.shift, modulation.scale, in_place=_without_gradients())
        return normed.to(dtype)

    def add(self, x: Tensor, update: Tensor, gate: Tensor | None, *, own: bool = False) -> Tensor:
        """Return x + update * gate, or x + update, in float32, with gate (B, G, d)."""
        in_place = own and _without_gradients()
        if gate is not None:
            return gated(x, update, gate, in_place=in_place)
        return x.add_(update) if in_place else x + update

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
        total = self.add(x, update, gate, own=own)
        return total, self.normalise(total, norm, modulation, dtype)


PLAIN = Plain()


def modulate(x: Tensor, shift: Tensor, scale: Tensor, *, in_place: bool = False) -> Tensor:
    """Return x (B, L, d) * (1 + scale) + shift with shift and scale (B, G, d)."""
    grouped = x.unflatten(1, (shift.shape[1], -1))
    factor, offset = 1 + scale.unsqueeze(2), shift.unsqueeze(2)
    return torch.addcmul(offset, grouped, factor, out=grouped if in_place else None).flatten(1, 2)


def gated(x: Tensor, update: Tensor, gate: Tensor, *, in_place: bool = False) -> Tensor:
    """Return x + update * gate in float32, with gate (B, G, d)."""
    grouped, more = (tokens.unflatten(1, (gate.shape[1], -1)) for tokens in (x, update.float()))
    return torch.addcmul(grouped, more, gate.unsqueeze(2), out=grouped if in_place else None).flatten(1, 2)


def _without_gradients() -> bool:
    """Return whether results may take the memory of operands: on a CPU, new memory costs as much as the operation."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()
