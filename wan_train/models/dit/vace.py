"""VACE (Jiang et al. 2025): a second stack of blocks whose hints are added to the base's tokens (official Wan2.1 VACE).

Legend: B batch, L tokens, T context tokens, D head width, d token width, G groups of tokens that share one modulation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wan_train.models.dit.block import Block
from wan_train.models.dit.layers import DitConfig
from wan_train.precision import Linear


class VaceBlock(Block):
    """A block on the VACE context, with a projection of its hint; the first block also projects its input."""

    ends_with_ffn = False  # the tokens are projected after the feed-forward

    def __init__(self, config: DitConfig, *, first: bool) -> None:
        super().__init__(config)
        if first:
            self.before_proj = Linear(config.dim, config.dim)
        self.after_proj = Linear(config.dim, config.dim)

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor, time: Tensor, rope: Tensor, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the next context tokens (B, L, d) float32 and their hint (B, L, d).

        x (B, L, d) float32, context (B, T, d), time (B, G, 6, d), rope (2, L, 1, D) as in `Block`; `start` (B, L, d),
        for the first VACE block only, are the base's tokens before its first block.
        """
        dtype = context.dtype
        if start is not None:
            x = self.before_proj(x.to(dtype)) + start
        x = super().forward(x, context, time, rope)
        return x, self.after_proj(x.to(dtype))


@dataclass
class VaceState:
    """Tokens (B, L, d) of the VACE context in a pass, replaced by each VACE block, and the scale of the hints."""

    tokens: Tensor
    scale: float


def add_hint(tokens: Tensor, hint: Tensor, scale: float) -> Tensor:
    """Return tokens (B, L, d) float32 + scale * hint (B, L, d)."""
    return torch.add(tokens, hint, alpha=scale)


def make_vace_blocks(config: DitConfig) -> nn.ModuleList:
    """Return the VACE blocks of a model, one for each of `config.vace_layers`."""
    return nn.ModuleList(VaceBlock(config, first=number == 0) for number in range(len(config.vace_layers)))
