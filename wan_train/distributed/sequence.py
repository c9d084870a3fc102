"""Sequence parallelism: each process has a share of the tokens, and in attention all tokens with a share of the heads.

The all-to-all exchange in attention is Ulysses (Jacobs et al. 2023, arXiv 2309.14509).

Legend: B batch, L tokens of the sequence, S tokens of a share, G groups of equally many tokens, N heads, D head width,
d token width, n processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from wan_train.distributed.groups import Split

# Renamed in newer releases of torch, where the old name warns.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Layout:
    """How `num_tokens` tokens in `num_groups` equal groups are split over `num_shares` processes.

    Every group is cut into `num_shares` equal runs, and a share has one run of each group: a share therefore also
    consists of equal groups, and group-wise modulation needs no change. The last runs of a group are padded with its
    last token.
    """

    num_tokens: int
    num_groups: int
    num_shares: int

    def __post_init__(self) -> None:
        if self.num_tokens % self.num_groups:
            raise ValueError(f"{self.num_tokens} tokens are not divisible by {self.num_groups} groups")

    @property
    def group(self) -> int:
        """Return the number of tokens of a group."""
        return self.num_tokens // self.num_groups

    @property
    def run(self) -> int:
        """Return the number of tokens of a share in each group, including padding."""
        return -(-self.group // self.num_shares)

    @property
    def share(self) -> int:
        """Return the number of tokens of a share, including padding."""
        return self.num_groups * self.run

    @property
    def is_padded(self) -> bool:
        """Return whether any share has padding."""
        return self.run * self.num_shares != self.group

    def sources(self, share: int) -> Tensor:
        """Return the indices (S,) in the sequence of a share's tokens; padding repeats the last token of its group."""
        run = (share * self.run + torch.arange(self.run)).clamp(max=self.group - 1)
        return (torch.arange(self.num_groups)[:, None] * self.group + run).flatten()

    def real(self, shares: Sequence[int]) -> Tensor:
        """Return the indices of the tokens of these shares, concatenated, that are not padding."""
        inside = torch.stack([share * self.run + torch.arange(self.run) for share in shares]) < self.group
        return inside[:, None, :].expand(-1, self.num_groups, -1).flatten().nonzero().flatten()


def take_share(x: Tensor, layout: Layout, share: int) -> Tensor:
    """Return the tokens (B, S, ...) of a share of x (B, L, ...)."""
    return x.index_select(1, layout.sources(share).to(x.device))


def join_shares(shares: Tensor, layout: Layout) -> Tensor:
    """Join the tokens (n, B, S, d) of all shares to (B, L, d)."""
    joined = rearrange(shares, "n B (G S) d -> B G (n S) d", G=layout.num_groups)
    return joined[:, :, : layout.group].flatten(1, 2)


def gather_shares(x: Tensor, layout: Layout, split: Split) -> Tensor:
    """All-gather the sequence (B, L, d) from the shares x (B, S, d) of the processes of `split`."""
    gathered = x.new_empty(split.size * len(x), *x.shape[1:])
    _all_gather(gathered, x.contiguous(), group=split.group)
    return join_shares(gathered.unflatten(0, (split.size, len(x))), layout)


def heads_for_tokens(x: Tensor, split: Split) -> Tensor:
    """Exchange x (B, S, N, D), all heads of a share, for (B, n S, N/n, D), some heads of all shares in rank order."""
    if split.size == 1:
        return x
    received = _exchanged(rearrange(x, "B S (n N) D -> n B S N D", n=split.size), split)
    return rearrange(received, "n B S N D -> B (n S) N D")


def tokens_for_heads(x: Tensor, split: Split) -> Tensor:
    """Exchange x (B, n S, N/n, D) for (B, S, N, D); the inverse of `heads_for_tokens`."""
    if split.size == 1:
        return x
    received = _exchanged(rearrange(x, "B (n S) N D -> n B S N D", n=split.size), split)
    return rearrange(received, "n B S N D -> B S (n N) D")


def _exchanged(parts: Tensor, split: Split) -> Tensor:
    """Send the i-th of `parts` (n, ...) to the i-th process; return the parts received, (n, ...) in rank order."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=split.group)
    return received
