"""Strips of the frames: the rows that they need, and that together they are the undivided frames."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import processes
from tests.unit.models.vae.vaes import SmallVae
from wan_train.models.vae.layers import AttentionBlock, FeatureCache
from wan_train.models.vae.strips import Reach, Strip, decoder_stages, encoder_stages, seen
from wan_train.models.vae.vae import WanVAE

ROWS = 48  # latent rows, more than any reach
CLOSE = 1e-5  # of pixels and latents near one: convolutions round by the size of what they are given


def test_a_strip_needs_the_rows_that_change_it_and_no_other_pair(vae: WanVAE, small: SmallVae) -> None:
    """Two latent rows in the middle, against the gradient that the input has from them."""
    strip = Strip(range(20, 22), ROWS)
    for stages, channels in (
        (decoder_stages(vae.decoder), vae.decoder.conv1.out_channels),
        (None, 3 * vae.encoder.patch**2),
    ):
        stages = stages or encoder_stages(vae.encoder)
        x = torch.randn(1, channels, 1, ROWS * stages[0].rows_in, 2 * stages[0].rows_in, requires_grad=True)
        y = x
        for stage in stages:
            y = stage.run(y, FeatureCache())
        own = stages[-1].rows_out
        y[..., 20 * own : 22 * own, :].sum().backward()
        assert x.grad is not None
        touched = x.grad.abs().amax(dim=(0, 1, 2, 4)).nonzero().flatten().tolist()
        needed = strip.needed(stages[0])
        assert needed.start == touched[0]
        # Halving takes whole pairs of rows, of which the last row's second one is not seen.
        assert touched[-1] <= needed.stop - 1 <= touched[-1] + stages[0].rows_in // stages[-1].rows_out


def test_at_the_edges_a_strip_ends_with_the_frame(vae: WanVAE) -> None:
    stages = decoder_stages(vae.decoder)
    assert Strip(range(0, 4), 8).needed(stages[0]) == range(0, 8)
    assert Strip(range(0, 4), 40).needed(stages[0]) == range(0, 17)
    assert Strip(range(36, 40), 40).needed(stages[-1]) == range(36 * 8 - 1, 320)


@pytest.mark.parametrize("layer", [AttentionBlock(4), nn.Conv2d(4, 4, 3)])
def test_a_layer_of_unknown_reach_is_refused(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"unknown reach of {type(layer).__name__}"):
        seen(layer, Reach())


def compare(folder: Path, ranks: int, *sizes: tuple[int, int]) -> None:
    words = [number for size in sizes for number in size]
    processes.run("tests/unit/models/vae/strip_parts.py", folder / "result", *words, ranks=ranks)
    for rank in range(ranks):
        found = json.loads((folder / f"result.{rank}").read_text())
        assert len(found) == 2 * len(sizes)
        for name, (latents, pixels, rows) in found.items():
            height = 8 * int(name.split()[1])
            assert latents < CLOSE, (rank, name, latents)
            assert (pixels is None) == (rank > 0) and (pixels or 0) < CLOSE, (rank, name, pixels)
            assert rows <= -(-height // 8 // ranks) * 8 + 2, (name, "one row at each edge enters the last layer")


def test_two_strips_are_the_whole(tmp_path: Path) -> None:
    compare(tmp_path, 2, (2, 13), (7, 5), (1, 1), (21, 1))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 4])
def test_more_strips_are_the_whole(ranks: int, tmp_path: Path) -> None:
    compare(tmp_path, ranks, (1, 5), (3, 13), (5, 13), (7, 1), (10, 5), (45, 5))
