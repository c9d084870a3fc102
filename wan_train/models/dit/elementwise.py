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
    """How a block computes what is between its products. Tokens x (B, L, d) are float32, updates of any dtype."""

    def normalise(self, x: Tensor, norm: LayerNorm, modulation: Modulation | None, dtype: torch.dtype) -> Tensor:
        """Return the modulated norm of x in `dtype`."""
        ...

    def add(self, x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
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
    ) -> tuple[Tensor, Tensor]:
        """Return `add` of x, and `normalise` of the sum."""
        ...


class Plain:
    """`Elementwise` with torch's operators."""

    def normalise(self, x: Tensor, norm: LayerNorm, modulation: Modulation | None, dtype: torch.dtype) -> Tensor:
        """Return the modulated norm of x in `dtype`."""
        normed = norm(x)
        return (normed if modulation is None else modulate(normed, modulation.shift, modulation.scale)).to(dtype)

    def add(self, x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
        """Return x + update * gate, or x + update, in float32, with gate (B, G, d)."""
        return x + update if gate is None else gated(x, update, gate)

    def add_normalise(
        self,
        x: Tensor,
        update: Tensor,
        gate: Tensor | None,
        norm: LayerNorm,
        modulation: Modulation | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Return `add` of x, and `normalise` of the sum."""
        total = self.add(x, update, gate)
        return total, self.normalise(total, norm, modulation, dtype)


PLAIN = Plain()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (B, L, d) * (1 + scale) + shift with shift and scale (B, G, d)."""
    grouped = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift.unsqueeze(2), grouped, 1 + scale.unsqueeze(2)).flatten(1, 2)


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Return x + update * gate in float32, with gate (B, G, d)."""
    groups = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, groups), update.unflatten(1, groups).float(), gate.unsqueeze(2)).flatten(1, 2)
