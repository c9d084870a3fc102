from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.frames import clip_positions, floor_frames, kept_frames


def test_lengths_are_floored_to_4k_plus_1():
    assert [floor_frames(n) for n in (1, 2, 4, 5, 24, 25, 81, 84, 85)] == [1, 1, 1, 5, 21, 25, 81, 81, 85]


def test_24_fps_keeps_two_of_three():
    assert kept_frames(10, 24.0) == (0, 2, 3, 5, 6, 8, 9)


def test_30_fps_keeps_eight_of_fifteen():
    assert kept_frames(16, 30) == (0, 2, 4, 6, 8, 10, 12, 14, 15)


@pytest.mark.parametrize("fps", [None, 16, 15.0, 8, 1])
def test_slower_or_equal_sources_keep_every_frame(fps):
    assert kept_frames(20, fps) == tuple(range(20))


@given(st.integers(1, 300), st.sampled_from(["12", "16", "18", "23.976", "24", "25", "29.97", "30", "50", "60", "120"]))
def test_kept_frames_agree_with_exact_arithmetic(num_frames, fps):
    ratio = Fraction(16) / Fraction(fps)
    ticks = [int(i * ratio) for i in range(num_frames)]
    expected = [i for i in range(num_frames) if i == 0 or ticks[i] > ticks[i - 1]]
    assert kept_frames(num_frames, float(fps)) == tuple(expected)


def test_head_takes_one_clip_of_each_target_that_fits():
    assert clip_positions(30, (1, 25, 45), "head", frame_sample=4) == ((0, 1), (0, 25))


def test_uniform_spreads_clips_over_the_video():
    assert clip_positions(100, (25,), "uniform", frame_sample=4) == ((0, 25), (25, 25), (50, 25), (75, 25))
    assert clip_positions(40, (25,), "uniform", frame_sample=3) == ((0, 25), (7, 25), (15, 25))


def test_uniform_with_one_sample_is_head():
    assert clip_positions(100, (1, 25), "uniform", frame_sample=1) == clip_positions(100, (1, 25), "head")


def test_uniform_without_room_takes_the_same_clip_once():
    assert clip_positions(25, (25,), "uniform", frame_sample=4) == ((0, 25),)
    assert clip_positions(26, (25,), "uniform", frame_sample=4) == ((0, 25), (1, 25))


def test_a_video_shorter_than_every_target_gives_nothing():
    assert clip_positions(24, (25, 45), "uniform", frame_sample=4) == ()


@given(st.integers(1, 1000), st.integers(0, 40), st.integers(2, 12))
def test_uniform_agrees_with_whole_number_arithmetic(num_frames, quads, samples):
    length = 4 * quads + 1
    expected = [(i * (num_frames - length) // (samples - 1), length) for i in range(samples)]
    found = clip_positions(num_frames, (length,), "uniform", frame_sample=samples)
    assert list(found) == (sorted(set(expected)) if length <= num_frames else [])
