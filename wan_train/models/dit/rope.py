"""Rotary position embedding over three axes (Su et al. 2021; the split over axes is Wan's).

Legend: D head width, L tokens in the order (f, h, w), N heads.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from wan_train.errors import InputError
from wan_train.placement.transfers import send

THETA = 10000.0
MAX_TABLES = 2  # tables kept; the largest take 80 MB each (75,600 tokens, head width 128)

_Positions = tuple[tuple[float, ...], ...]
_Key = tuple[_Positions, int, torch.device, "Rate | None"]
_tables: "OrderedDict[_Key, Tensor]" = OrderedDict()


@dataclass(frozen=True)
class Rate:
    """A temporal frequency, in radians per latent frame, that replaces the frequency `index` (1 is the highest)."""

    index: int
    radians: float


@dataclass(frozen=True)
class Riflex:
    """RIFLEx (Zhao et al. 2025, arXiv 2502.15894): lower one temporal frequency in videos longer than trained.

    `index` is the frequency (1 is the highest), `num_trained` the number of latent frames that the model was trained
    with.
    """

    index: int
    num_trained: int

    def rate(self, num_frames: int, width: int) -> Rate | None:
        """Return the lowered frequency for `num_frames` latent frames, with `width` elements of a head on the temporal
        axis.

        Its period is num_frames / 0.9 (equation 8, with the margin of the authors' code). Returns None if the video is
        not longer than trained, or if the period of the frequency is long enough already. Raises InputError if the
        model has no frequency with this index.
        """
        if self.index > width // 2:
            raise InputError(f"--riflex_freq_index {self.index}: the model has only {width // 2} temporal frequencies")
        lowered = 0.9 * 2 * math.pi / num_frames
        is_long = num_frames > self.num_trained and lowered < frequency(self.index, width)
        return Rate(self.index, lowered) if is_long else None


def frequency(index: int, width: int) -> float:
    """Return the frequency `index` (from 1), in radians per position, of an axis with `width` elements of a head."""
    return THETA ** (-2 * (index - 1) / width)


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Return the number of elements of a head that are rotated by frame, row and column position."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_table(
    grid: tuple[int, int, int],
    head_dim: int,
    *,
    device: torch.device,
    frames: Tensor | None = None,
    riflex: Riflex | None = None,
) -> Tensor:
    """Return the rope table of all tokens: (2, L, 1, D) float32, for `rotate`; read-only.

    `grid` counts patches over frames, rows and columns; `frames` (F,) are frame positions, default: 0..F-1; `riflex`
    lowers a temporal frequency in long videos. The first half contains the cosine of each pair twice, the second its
    sine with the signs of a rotation. Tables are cached by positions, width, device and frequencies; the last
    `MAX_TABLES` are kept.
    """
    positions = tuple(tuple(map(float, range(count))) for count in grid)
    if frames is not None:
        positions = (tuple(map(float, frames.tolist())), *positions[1:])
    rate = None if riflex is None else riflex.rate(grid[0], axis_widths(head_dim)[0])
    # Dispatch modes (a ledger, fake tensors) and tracers need a table of their own.
    if device.type == "meta" or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return _make_table(positions, head_dim, device, rate)
    key = (positions, head_dim, device, rate)
    # A table made in inference mode could not be used in a later backward pass.
    with torch.inference_mode(False), torch.no_grad():
        table = _tables.pop(key, None)
        _tables[key] = table = _make_table(positions, head_dim, device, rate) if table is None else table
        if len(_tables) > MAX_TABLES:
            _tables.popitem(last=False)
        return table.detach()  # a new tensor, so that attributes set by compilers do not reach the next caller


def _make_table(positions: _Positions, head_dim: int, device: torch.device, rate: Rate | None) -> Tensor:
    """Compute the angles of each axis on the CPU in float64, and expand their cosines and sines to all tokens on the
    device.

    At position 1000 float32 would be off by 1e-4, and some devices have no float64.
    """
    grid = [len(axis_positions) for axis_positions in positions]
    parts = []
    for axis, (axis_positions, width) in enumerate(zip(positions, axis_widths(head_dim), strict=True)):
        rates = THETA ** -(torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
        if axis == 0 and rate is not None:
            rates[rate.index - 1] = rate.radians
        angles = torch.outer(torch.tensor(axis_positions, dtype=torch.float64, device="cpu"), rates)
        cosines = angles.cos().repeat_interleave(2, dim=-1)
        sines = torch.stack([-angles.sin(), angles.sin()], dim=-1).flatten(-2)
        part = send(torch.stack([cosines, sines]).float(), device)
        part = part.view(2, *[-1 if i == axis else 1 for i in range(3)], width)
        parts.append(part.expand(2, *grid, width))
    return torch.cat(parts, dim=-1).view(2, -1, 1, head_dim)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate pairs of adjacent elements of x (..., L, N, D) float32: x cos + swapped x sin.

    `cosines` and `sines` as in `rope_table`, broadcastable to x; negated sines invert the rotation.
    """
    swapped = torch.empty_like(x)
    swapped[..., 0::2] = x[..., 1::2]
    swapped[..., 1::2] = x[..., 0::2]
    return swapped.mul_(sines).addcmul_(x, cosines)
