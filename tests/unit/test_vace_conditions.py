"""The VACE context against oracles that are written with loops, from the specification alone."""

import math

import pytest
import torch
from torch import Tensor

from wan_train.conditions.vace import letterboxed, num_references, packed_mask, vace_context, with_references

HEIGHT, WIDTH = 16, 24


def encode(pixels: Tensor) -> Tensor:
    """Latents (1, 16, F, H, W) that tell the pixels: channel c is (c + 1) times the mean of each cell's first frame, by
    four frames after the first."""
    frames = [0, *range(1, pixels.shape[2], 4)]
    cells = pixels[:, :, frames].mean(dim=1).unflatten(-1, (-1, 8)).mean(-1).unflatten(-2, (-1, 8)).mean(-2)
    return cells[:, None] * torch.arange(1, 17).view(1, 16, 1, 1, 1)


def packed_by_loops(mask: Tensor) -> Tensor:
    frames, height, width = mask.shape
    num_latent = (frames + 3) // 4
    found = torch.zeros(64, num_latent, height // 8, width // 8)
    for latent in range(num_latent):
        source = min(math.floor((latent + 0.5) * frames / num_latent), frames - 1)
        for y in range(height):
            for x in range(width):
                found[8 * (y % 8) + x % 8, latent, y // 8, x // 8] = mask[source, y, x]
    return found


@pytest.mark.parametrize("num_frames", [1, 5, 13, 81])
def test_the_mask_becomes_64_channels(num_frames: int) -> None:
    mask = (torch.rand(num_frames, HEIGHT, WIDTH) > 0.5).float()
    assert torch.equal(packed_mask(mask), packed_by_loops(mask))


@pytest.mark.parametrize("num_frames", [1, 5, 13, 81])
def test_kept_before_made_before_mask(num_frames: int) -> None:
    """A white video with a mask that makes the left third anew: first what is kept, right of it, then what is not."""
    video, mask = torch.ones(3, num_frames, HEIGHT, WIDTH), torch.zeros(num_frames, HEIGHT, WIDTH)
    mask[:, :, :8] = 1
    context = vace_context(video, mask, (), encode, shape=(num_frames, HEIGHT, WIDTH))
    assert context.shape == (96, (num_frames + 3) // 4, 2, 3)
    for channel in range(16):
        for cell, (kept, made) in enumerate([(0, 1), (1, 0), (1, 0)]):
            assert (context[channel, :, :, cell] == kept * (channel + 1)).all()
            assert (context[16 + channel, :, :, cell] == made * (channel + 1)).all()
    assert torch.equal(context[32:], packed_by_loops(mask))


def test_masks_are_either_or() -> None:
    video, shape = torch.full((3, 1, HEIGHT, WIDTH), 0.5), (1, HEIGHT, WIDTH)
    grey = torch.full(shape, 0.5)
    grey[:, :, 8:] = 0.51
    hard = (torch.arange(WIDTH) >= 8).float().expand(shape)
    assert torch.equal(
        vace_context(video, grey, (), encode, shape=shape), vace_context(video, hard, (), encode, shape=shape)
    )


def test_without_a_mask_or_a_video_all_is_made_anew() -> None:
    video, shape = torch.rand(3, 5, HEIGHT, WIDTH), (5, HEIGHT, WIDTH)
    alone = vace_context(video, None, (), encode, shape=shape)
    assert torch.equal(alone, vace_context(video, torch.ones(shape), (), encode, shape=shape))
    assert (alone[:16] == 0).all() and torch.equal(alone[16:32], encode(video[None])[0]) and (alone[32:] == 1).all()
    none = vace_context(None, torch.zeros(shape), (), encode, shape=shape)
    assert (none[:32] == 0).all() and (none[32:] == 1).all()


def test_references_stand_in_front_alone() -> None:
    images = [torch.full((3, HEIGHT, WIDTH), value) for value in (0.25, -0.5)]
    shape = (5, HEIGHT, WIDTH)
    context = vace_context(torch.ones(3, *shape), None, images, encode, shape=shape)
    assert context.shape == (96, 4, 2, 3)
    for place, value in enumerate((0.25, -0.5)):
        assert torch.equal(context[:16, place], value * torch.arange(1, 17).view(16, 1, 1).expand(16, 2, 3))
        assert (context[16:, place] == 0).all()
    assert torch.equal(context[:, 2:], vace_context(torch.ones(3, *shape), None, (), encode, shape=shape))
    latents = torch.randn(1, 16, 2, 2, 3)
    assert num_references(context[None], latents) == 2
    target = with_references(latents, context[None])
    assert torch.equal(target[:, :, :2], context[None, :16, :2]) and torch.equal(target[:, :, 2:], latents)
    assert torch.equal(with_references(latents, context[None, :, 2:]), latents)


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((4, 4), (0, 16), (4, 20)),
        ((4, 12), (4, 12), (0, 24)),
        ((32, 16), (0, 16), (8, 16)),
        ((16, 24), (0, 16), (0, 24)),
    ],
)
def test_references_keep_their_shape_on_white(
    size: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    made = letterboxed(torch.full((3, *size), -1.0), HEIGHT, WIDTH)
    expected = torch.ones(3, HEIGHT, WIDTH)
    expected[:, rows[0] : rows[1], columns[0] : columns[1]] = -1
    assert torch.equal(made, expected)
