import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.reading.frames import EXTRACTIONS, clip_positions, floor_frames, kept_frames, timed_frames


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


def test_chunk_tiles_the_video_and_leaves_the_rest():
    assert clip_positions(30, (1, 9), "chunk")[-3:] == ((0, 9), (9, 9), (18, 9))
    assert clip_positions(5, (1,), "chunk") == ((0, 1), (1, 1), (2, 1), (3, 1), (4, 1))


def test_slide_goes_on_by_its_stride():
    assert clip_positions(30, (9, 25), "slide", frame_stride=10) == ((0, 9), (10, 9), (20, 9), (0, 25))


def test_full_takes_one_clip_up_to_its_limit():
    assert clip_positions(100, (1, 25), "full") == ((0, 97),)
    assert clip_positions(300, (25,), "full") == ((0, 129),)
    assert clip_positions(300, (25,), "full", max_frames=80) == ((0, 77),)
    assert clip_positions(3, (25,), "full") == ((0, 1),)


def walk_positions(num_frames, targets, extraction, sample, stride, limit):
    """The clips of a video, found by looking at every frame in turn."""
    if extraction == "full":
        return [(0, max(n for n in range(1, min(num_frames, limit) + 1) if n % 4 == 1))]
    found = []
    for length in targets:
        for start in range(num_frames):
            if start + length > num_frames:
                break
            steps = {"head": num_frames, "chunk": length, "slide": stride}
            if extraction == "uniform":
                room = num_frames - length
                # Clip k of n starts at the last frame that is not after k/(n-1) of the room.
                meant = {room * k // (sample - 1) for k in range(sample)} if sample > 1 else {0}
                taken = start in meant
            else:
                taken = start % steps[extraction] == 0
            if taken:
                found.append((start, length))
    return found


def test_random_videos_agree_with_a_walk_over_their_frames():
    chance = random.Random(0)
    for number in range(10_000):
        num_frames, limit = chance.randrange(1, 400), chance.randrange(1, 300)
        targets = sorted({4 * chance.randrange(0, 40) + 1 for _ in range(chance.randrange(1, 4))})
        sample, stride = chance.randrange(1, 12), chance.randrange(1, 60)
        extraction = EXTRACTIONS[number % len(EXTRACTIONS)]
        found = clip_positions(
            num_frames, targets, extraction, frame_sample=sample, frame_stride=stride, max_frames=limit
        )
        assert list(found) == walk_positions(num_frames, targets, extraction, sample, stride, limit)
        assert all(start + length <= num_frames and length % 4 == 1 for start, length in found)


@given(st.integers(1, 300), st.sampled_from(["8", "12", "16", "23.976", "24", "25", "29.97", "30", "48", "60", "120"]))
def test_constant_rates_show_the_frame_of_each_sixteenth_of_a_second(num_frames, fps):
    rate = Fraction(fps)
    times = [float(i / rate) for i in range(num_frames + 1)]
    shown = timed_frames(times)
    # One step more or less where a frame begins within the rounding of a step.
    assert abs(len(shown) - num_frames * 16 / rate) <= 1
    for k, index in enumerate(shown):
        exact = int(Fraction(k, 16) * rate)
        late = exact + 1 < num_frames and (exact + 1) / rate - Fraction(k, 16) <= Fraction(11, 10000)
        assert index == min(exact + late, num_frames - 1)


def test_16_fps_is_taken_as_it_is_whatever_the_container_rounds_to():
    for digits in (2, 3, 6):
        times = [round(i / 16 + 1e-9, digits) if digits > 2 else i / 16 for i in range(82)]
        assert timed_frames(times) == tuple(range(81))


def test_variable_rates_keep_their_time():
    # An image that stays for half a second, then eight at 32 a second.
    times = [0.0, *(0.5 + i / 32 for i in range(9))]
    assert timed_frames(times) == (0,) * 8 + (1, 3, 5, 7)


def test_a_slow_source_holds_its_frames():
    assert timed_frames([i / 8 for i in range(5)]) == (0, 0, 1, 1, 2, 2, 3, 3)
    assert timed_frames([0.0, 1 / 12, 2 / 12, 3 / 12]) == (0, 0, 1, 2)


def test_no_frame_lasts_no_time():
    assert timed_frames([0.0, 0.01]) == (0,)
