"""Sequence parallelism: each process has a share of the tokens, and in attention all tokens with a share of the heads.

Attention by all-to-all is Ulysses (Jacobs et al. 2023, arXiv 2309.14509).

Legend: B batch, L tokens of the sequence, S tokens of a share, G groups of equally many tokens, N heads, D head width,
d width of a token, n processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from wan_train.distributed.groups import Split

# Its older name warns in newer releases of torch, which older ones do not have.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Layout:
    """How `num_tokens` in `num_groups` groups of equally many are shared out among `num_shares` processes.

    Every group is cut into `num_shares` runs of equally many tokens, and a share has one run of each group: so a share
    too is made of groups of equally many tokens, and what is modulated group by group stays as it is. The last runs of
    a group are padded with its last token.
    """

    num_tokens: int
    num_groups: int
    num_shares: int

    def __post_init__(self) -> None:
        if self.num_tokens % self.num_groups:
            raise ValueError(f"{self.num_tokens} tokens do not divide into {self.num_groups} groups")

    @property
    def group(self) -> int:
        """Number of tokens of a group."""
        return self.num_tokens // self.num_groups

    @property
    def run(self) -> int:
        """Number of tokens that a share has of each group, padding included."""
        return -(-self.group // self.num_shares)

    @property
    def share(self) -> int:
        """Number of tokens of a share, padding included."""
        return self.num_groups * self.run

    @property
    def is_padded(self) -> bool:
        """Whether any share has padding."""
        return self.run * self.num_shares != self.group

    def sources(self, share: int) -> Tensor:
        """Which tokens (S,) of the sequence those of a share are, padding being copies of the last of its group."""
        run = (share * self.run + torch.arange(self.run)).clamp(max=self.group - 1)
        return (torch.arange(self.num_groups)[:, None] * self.group + run).flatten()

    def real(self, shares: Sequence[int]) -> Tensor:
        """The indices of those tokens of these shares, one share after the other, that are not padding."""
        inside = torch.stack([share * self.run + torch.arange(self.run) for share in shares]) < self.group
        return inside[:, None, :].expand(-1, self.num_groups, -1).flatten().nonzero().flatten()


def take_share(x: Tensor, layout: Layout, share: int) -> Tensor:
    """x (B, L, ...) -> the tokens (B, S, ...) of a share."""
    return x.index_select(1, layout.sources(share).to(x.device))


def join_shares(shares: Tensor, layout: Layout) -> Tensor:
    """The tokens (n, B, S, d) of all shares -> (B, L, d)."""
    joined = rearrange(shares, "n B (G S) d -> B G (n S) d", G=layout.num_groups)
    return joined[:, :, : layout.group].flatten(1, 2)


def gather_shares(x: Tensor, layout: Layout, split: Split) -> Tensor:
    """The sequence (B, L, d), on each process of `split`, of its shares x (B, S, d)."""
    gathered = x.new_empty(split.size * len(x), *x.shape[1:])
    _all_gather(gathered, x.contiguous(), group=split.group)
    return join_shares(gathered.unflatten(0, (split.size, len(x))), layout)


def heads_for_tokens(x: Tensor, split: Split) -> Tensor:
    """x (B, S, N, D), all heads of a share -> (B, n S, N/n, D), this process's heads of all shares in their order."""
    if split.size == 1:
        return x
    received = _exchanged(rearrange(x, "B S (n N) D -> n B S N D", n=split.size), split)
    return rearrange(received, "n B S N D -> B (n S) N D")


def tokens_for_heads(x: Tensor, split: Split) -> Tensor:
    """x (B, n S, N/n, D) -> (B, S, N, D); the inverse of `heads_for_tokens`."""
    if split.size == 1:
        return x
    received = _exchanged(rearrange(x, "B (n S) N D -> n B S N D", n=split.size), split)
    return rearrange(received, "n B S N D -> B S (n N) D")


def _exchanged(parts: Tensor, split: Split) -> Tensor:
    """Of `parts` (n, ...) the i-th goes to the i-th process; what all of them sent here, (n, ...) in their order."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=split.group)
    return received
