"""Overlapping, blended tiles: memory use is that of one tile, regardless of the image size.

Near its inner edges a tile's result is computed from zero padding instead of its neighbours; its weight is zero there
and increases inwards, and the weights of all tiles sum to one at each position.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Side of a tile and minimum overlap of neighbours, in latent positions; the overlap is less than the side."""

    size: int = 34
    overlap: int = 8

    def divides(self, height: int, width: int) -> bool:
        """Return whether latents of this height and width need more than one tile."""
        return max(height, width) > self.size


def tile_starts(length: int, tiling: Tiling) -> list[int]:
    """Return the start of each tile on an axis: as few as possible, evenly spaced, the first and last at the ends."""
    room = max(length - tiling.size, 0)
    num_steps = math.ceil(room / (tiling.size - tiling.overlap))
    return [0, *(room * step // num_steps for step in range(1, num_steps + 1))]


def tile_weights(length: int, starts: Sequence[int], size: int) -> Tensor:
    """Return the weight (tiles, length) of each tile at each position of an axis; columns sum to one.

    In the overlap of two neighbours the outer quarter of each has weight zero; in the middle half the weights change
    linearly.
    """
    positions = torch.arange(length)
    weights = torch.stack([(start <= positions) & (positions < start + size) for start in starts]).float()
    for left, right in itertools.pairwise(range(len(starts))):
        shared = starts[left] + size - starts[right]
        ramp = (2 * (torch.arange(shared) + 0.5) / shared - 0.5).clamp(0, 1)
        weights[right, starts[right] : starts[right] + shared] *= ramp
        weights[left, starts[right] : starts[right] + shared] *= ramp.flip(0)
    return weights / weights.sum(0)


def blend_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tiling: Tiling, *, cell: int, out_cell: int) -> Tensor:
    """Apply `function` to each tile of (..., H, W) and blend the results in float32 on the device of `x`.

    A latent position is `cell` x `cell` positions of `x`, and `out_cell` x `out_cell` of the result.
    """
    result = torch.empty(0)
    height, width = (side // cell for side in x.shape[-2:])
    rows, columns = tile_starts(height, tiling), tile_starts(width, tiling)
    size = tiling.size * out_cell
    row_weights = tile_weights(height * out_cell, [row * out_cell for row in rows], size).to(x.device)
    column_weights = tile_weights(width * out_cell, [column * out_cell for column in columns], size).to(x.device)
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        of_x = (_span(row, tiling.size, cell, height), _span(column, tiling.size, cell, width))
        of_result = (_span(row, tiling.size, out_cell, height), _span(column, tiling.size, out_cell, width))
        tile = function(x[..., of_x[0], of_x[1]])
        if not result.numel():
            result = tile.new_zeros((*tile.shape[:-2], height * out_cell, width * out_cell), dtype=torch.float32)
        weighted = tile * row_weights[i, of_result[0], None] * column_weights[j, of_result[1]]
        result[..., of_result[0], of_result[1]] += weighted
    return result


def _span(start: int, size: int, cell: int, end: int) -> slice:
    return slice(start * cell, min(start + size, end) * cell)
