"""Rotary positions in three axes (Su et al. 2021; the split over axes is Wan's).

Legend: D head width, L tokens in the order (f, h, w), N heads.
"""

from collections import OrderedDict

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

THETA = 10000.0
MAX_TABLES = 2  # that are kept: the largest take 80 MB each (75,600 tokens, head width 128)

_Key = tuple[tuple[tuple[float, ...], ...], int, torch.device]
_tables: "OrderedDict[_Key, Tensor]" = OrderedDict()


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's numbers turn with the frame, the row and the column."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotations(
    grid: tuple[int, int, int], head_dim: int, *, device: torch.device, frames: Tensor | None = None
) -> Tensor:
    """The rope table of every token: (2, L, 1, D) float32, for `rotate`; not to be written to.

    `grid` counts patches over frames, rows and columns; `frames` (F,) gives frame positions other than 0..F-1. The
    first half holds the cosine of each pair twice, the second its sine with the signs that a rotation gives the pair.
    A table is made once for its positions, width and device; the last `MAX_TABLES` are kept.
    """
    places = tuple(tuple(map(float, range(count))) for count in grid)
    if frames is not None:
        places = (tuple(map(float, frames.tolist())), *places[1:])
    # What watches or replaces operators (a ledger, fake tensors) must see its own table; a tracer has no use for ours.
    if device.type == "meta" or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return _make_table(places, head_dim, device)
    key = (places, head_dim, device)
    # Made in inference mode a table could not serve a later backward pass.
    with torch.inference_mode(False), torch.no_grad():
        table = _tables.pop(key, None)
        _tables[key] = table = _make_table(places, head_dim, device) if table is None else table
        if len(_tables) > MAX_TABLES:
            _tables.popitem(last=False)
        return table.detach()  # a tensor of its own: what compilers note on it is not for the next caller


def _make_table(places: tuple[tuple[float, ...], ...], head_dim: int, device: torch.device) -> Tensor:
    """Angles of each axis by themselves, on the CPU in float64 (at position 1000 float32 would already be off by 1e-4,
    and some devices have no float64); their cosines and sines are repeated for every token on the device."""
    grid = [len(place) for place in places]
    parts = []
    for axis, (place, width) in enumerate(zip(places, axis_widths(head_dim), strict=True)):
        rates = THETA ** -(torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
        angles = torch.outer(torch.tensor(place, dtype=torch.float64, device="cpu"), rates)
        cosines = angles.cos().repeat_interleave(2, dim=-1)
        sines = torch.stack([-angles.sin(), angles.sin()], dim=-1).flatten(-2)
        part = torch.stack([cosines, sines]).float().to(device)
        part = part.view(2, *[-1 if i == axis else 1 for i in range(3)], width)
        parts.append(part.expand(2, *grid, width))
    return torch.cat(parts, dim=-1).view(2, -1, 1, head_dim)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the pairs of adjacent numbers of x (..., L, N, D) float32: x cos + swapped x sin.

    `cosines` and `sines` as in `rotations`, to broadcast against x; negated sines turn back.
    """
    swapped = torch.empty_like(x)
    swapped[..., 0::2] = x[..., 1::2]
    swapped[..., 1::2] = x[..., 0::2]
    return swapped.mul_(sines).addcmul_(x, cosines)
