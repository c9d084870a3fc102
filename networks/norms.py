"""Compute and limit the norms of the changes made by pairs."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from networks.deltas.lora import LoraBranch

TOLERANCE = 1e-5  # relative, in float32: a norm just limited does not exceed the limit again


@dataclass(frozen=True)
class Norms:
    """Norms of all modules' changes after limiting: how many were limited, their mean and their maximum."""

    num_scaled: int
    mean: float
    maximum: float


def by_shape(branches: Iterable[LoraBranch]) -> list[list[LoraBranch]]:
    """Return the branches in groups of equal shapes, for batched computation."""
    groups: dict[tuple[torch.Size, torch.Size], list[LoraBranch]] = {}
    for branch in branches:
        groups.setdefault((branch.down.weight.shape, branch.up.weight.shape), []).append(branch)
    return list(groups.values())


@torch.no_grad()
def delta_norms(groups: Sequence[Sequence[LoraBranch]]) -> Tensor:
    """Return ||scale * up @ down|| of every branch, group by group (n,), in float32 on the parameters' device."""
    norms = []
    for group in groups:
        down = torch.stack([branch.down.weight.flatten(1) for branch in group])
        up = torch.stack([branch.up.weight.flatten(1) for branch in group])
        scales = torch.tensor([branch.scale for branch in group], device=down.device)
        norms.append(_product_norms(up, down) * scales.abs())
    return torch.cat(norms)


def limit_norms(groups: Sequence[Sequence[LoraBranch]], limit: float) -> Norms:
    """Scale both factors of each branch equally until ||scale * up @ down|| is at most `limit` (kohya's max norm)."""
    branches = [branch for group in groups for branch in group]
    norms = delta_norms(groups).tolist()
    long = [
        (branch, math.sqrt(limit / norm))
        for branch, norm in zip(branches, norms, strict=True)
        if norm > limit * (1 + TOLERANCE)
    ]
    if long:
        pairs = [(factor.weight, by) for branch, by in long for factor in (branch.down, branch.up)]
        with torch.no_grad():
            torch._foreach_mul_([weight for weight, _ in pairs], [by for _, by in pairs])
    limited = [min(norm, limit) for norm in norms]
    return Norms(len(long), sum(limited) / len(limited), max(limited))


def _product_norms(up: Tensor, down: Tensor) -> Tensor:
    """Return the Frobenius norms (n,) of up (n, out, r) @ down (n, r, in), as the root of <up^T up, down down^T>, both
    r x r.

    If the rank is so high that this takes more work, the product is computed instead, one at a time.
    """
    rank, inputs, outputs = down.shape[1], down.shape[2], up.shape[1]
    if rank * (inputs + outputs) >= inputs * outputs:
        return torch.stack([(one @ other).norm() for one, other in zip(up, down, strict=True)])
    squares = ((up.mT @ up) * (down @ down.mT)).sum(dim=(1, 2))
    return squares.clamp(min=0).sqrt()
