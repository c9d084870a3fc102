"""Rotary positions in three axes (Su et al. 2021; the split over axes is Wan's).

Legend: D head width, L tokens in the order (f, h, w), N heads.
"""

import torch
from torch import Tensor

THETA = 10000.0


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's numbers turn with the frame, the row and the column."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotations(
    grid: tuple[int, int, int], head_dim: int, *, device: torch.device, frames: Tensor | None = None
) -> Tensor:
    """The turn of every token: (2, L, 1, D) float32, for `rotate`.

    `grid` counts patches over frames, rows and columns; `frames` (F,) gives frame positions other than 0..F-1. The
    first half holds the cosine of each pair twice, the second its sine with the signs that a rotation gives the pair.
    Angles are taken in float64: at position 1000 float32 would already be off by 1e-4.
    """
    positions = [torch.arange(n, dtype=torch.float64) for n in grid]
    if frames is not None:
        positions[0] = frames.to(torch.float64).cpu()
    angles = []
    for axis, (place, width) in enumerate(zip(positions, axis_widths(head_dim), strict=True)):
        rates = THETA ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = torch.outer(place, rates)
        angles.append(angle.view(*[-1 if i == axis else 1 for i in range(3)], width // 2).expand(*grid, width // 2))
    turned = torch.cat(angles, dim=-1).reshape(-1, 1, head_dim // 2)
    cosines = turned.cos().repeat_interleave(2, dim=-1)
    sines = torch.stack([-turned.sin(), turned.sin()], dim=-1).flatten(-2)
    return torch.stack([cosines, sines]).float().to(device)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the pairs of adjacent numbers of x (..., L, N, D) float32: x cos + swapped x sin.

    `cosines` and `sines` as in `rotations`, to broadcast against x; negated sines turn back.
    """
    swapped = torch.empty_like(x)
    swapped[..., 0::2] = x[..., 1::2]
    swapped[..., 1::2] = x[..., 0::2]
    return swapped.mul_(sines).addcmul_(x, cosines)
