"""The small control model: outlines, the judge of what follows them, and its training from the plain model's file."""

from pathlib import Path

import numpy as np
import pytest
import torch

from examples.nano import train_control
from examples.nano.judge import centres, follows
from examples.nano.names import DIT
from examples.nano.world import FRAMES, SIZE, draw, draw_outline, training_scenes
from wan_train.models.loading import check_dit, load_dit
from wan_train.models.variants import VARIANTS

SCENES = training_scenes()


@pytest.mark.parametrize("number", range(0, len(SCENES), 37))
def test_an_outline_lies_around_its_shape(number: int) -> None:
    clip, outline = draw(SCENES[number], number), draw_outline(SCENES[number], number)
    assert outline.shape == (FRAMES, SIZE, SIZE, 3) and outline.dtype == np.uint8
    for frame, centre in zip(outline, centres(clip), strict=True):
        rows, columns = np.nonzero(frame[..., 0] > 127)
        assert centre is not None
        assert columns.min() < centre[0] < columns.max() and rows.min() < centre[1] < rows.max()
        assert frame[round(centre[1]), round(centre[0])].max() == 0  # a line, not a disc


def test_the_judge_tells_a_clip_that_goes_its_way_from_others() -> None:
    scene = next(scene for scene in SCENES if scene.motion == "moves up")
    clip = draw(scene, 3)
    assert follows(clip, clip) and follows(draw(scene, 3), clip)
    assert not follows(clip[::-1], clip)
    assert not follows(np.roll(clip, 5, axis=2), clip)
    assert not follows(np.zeros_like(clip), clip)


def test_a_model_is_made_and_trained_from_the_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_control, "training_scenes", lambda: SCENES[:2])
    train_control.train(tmp_path, minutes=0.01, clips=1)
    assert check_dit(tmp_path / DIT, VARIANTS["t2v-14B-FC"]) is not None  # it is small
    base, model = load_dit(train_control.MODEL / DIT), load_dit(tmp_path / DIT)
    assert model.config.in_dim == 48 and model.config.num_heads == base.config.num_heads
    columns = model.patch_embedding.weight.detach().float()
    assert columns[:, 16:32].abs().max() > 0  # the control's are trained
    assert columns[:, 32:].abs().max() == 0  # no clip has a start image
    plain = model(
        torch.zeros(1, 16, 1, 2, 2),
        torch.tensor([500.0]),
        [torch.zeros(1, 64)],
        image_latents=torch.zeros(1, 32, 1, 2, 2),
    )
    assert plain.isfinite().all()
