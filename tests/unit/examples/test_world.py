"""The small world: the same frames everywhere, captions that say what is there, and a judge that sees it."""

import hashlib

import numpy as np
import pytest

from examples.nano.judge import PALETTE, judge, psnr
from examples.nano.world import (
    BACKGROUNDS,
    COLOURS,
    FRAMES,
    MOTIONS,
    NEW_COLOURS,
    SHAPES,
    SIZE,
    UNUSED_WORDS,
    Scene,
    all_scenes,
    choose_scenes,
    draw,
    held_out_scenes,
    training_scenes,
)

RED = Scene("red", "triangle", "moves up", "navy")


def test_the_frames_of_a_seed_are_these() -> None:
    clip = draw(RED, 7)
    assert clip.shape == (FRAMES, SIZE, SIZE, 3) and clip.dtype == np.uint8
    assert hashlib.sha256(clip.tobytes()).hexdigest()[:16] == "f6c4b6c67d1c0632"
    assert not np.array_equal(clip, draw(RED, 8))


def test_held_out_scenes_are_kept_apart_and_have_every_part() -> None:
    held, taught = held_out_scenes(), training_scenes()
    assert not set(held) & set(taught) and set(held) | set(taught) == set(all_scenes())
    for scenes in (held, taught):
        assert {s.colour for s in scenes} == set(COLOURS)
        assert {s.shape for s in scenes} == set(SHAPES)
        assert {s.motion for s in scenes} == set(MOTIONS)
        assert {s.background for s in scenes} == set(BACKGROUNDS)


def test_no_caption_holds_a_word_that_is_kept_unused() -> None:
    words = {word for scene in all_scenes() for word in scene.caption.split()}
    assert len(set(UNUSED_WORDS)) == 16 and not words & set(UNUSED_WORDS)
    assert set(NEW_COLOURS) <= set(UNUSED_WORDS)
    assert RED.caption == "a red triangle moves up on a navy background"


def test_the_judge_is_right_on_every_scene_as_it_is_drawn() -> None:
    scenes = all_scenes([*COLOURS, *NEW_COLOURS])
    wrong = [scene for index, scene in enumerate(scenes) if not judge(draw(scene, index)).fits(scene)]
    assert wrong == []


def test_the_judge_does_not_let_pass_what_is_wrong() -> None:
    clip = draw(RED, 3)
    empty = np.full_like(clip, 30)
    two = np.minimum(clip.astype(int) + np.roll(clip, 16, axis=2) - clip[0, 0, 0], 255).astype(np.uint8)
    torn = clip.copy()
    torn[:, ::3] = clip[0, 0, 0]
    late = clip.copy()
    late[-1] = clip[0, 0, 0]
    for spoilt in (empty, two, torn, late):
        assert not judge(spoilt).whole
    assert judge(clip[::-1]).motion == "moves down"
    assert judge(clip[..., [1, 0, 2]]).colour == "green"
    assert not judge(clip).fits(Scene("blue", "triangle", "moves up", "navy"))
    assert set(PALETTE) == {*COLOURS, *NEW_COLOURS}


def test_scenes_are_chosen_by_seed_and_do_not_repeat_before_they_must() -> None:
    assert choose_scenes(20, 1) == choose_scenes(20, 1) != choose_scenes(20, 2)
    assert len(set(choose_scenes(360, 1))) == 360
    assert {scene.colour for scene in choose_scenes(10, 1, ["cyan"])} == {"cyan"}


@pytest.mark.parametrize(("error", "decibels"), [(0, float("inf")), (255, 0.0), (25.5, 20.0)])
def test_psnr(error: float, decibels: float) -> None:
    black = np.zeros((2, 4, 4, 3))
    assert psnr(black, black + error) == pytest.approx(decibels)  # type: ignore[arg-type]
