"""Clips of drawn videos hold exactly the frames that the plan says, told by the number in each image."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from dataset.config import read_config
from dataset.reading.frames import EXTRACTIONS, timed_frames
from dataset.reading.media import load_clips, probe
from dataset.sources import list_items, plan_clips
from tests.unit.dataset.drawing import cut_video, draw_frame, draw_image, draw_video, read_number, write_toml

_NUM_FRAMES = 61
_UNEVEN = [int(40 * i + 300 * (i > 20) + 15 * (i % 3)) for i in range(_NUM_FRAMES)]


def constant(fps):
    return lambda path: draw_video(path, _NUM_FRAMES, fps=fps)


def shown(seconds, times):
    """The frame on screen at a moment, by the plainest of searches."""
    return max(i for i, begin in enumerate(times) if begin <= seconds + Fraction(11, 10000))


def draw_cut(path):
    cut_video(draw_video(path.with_name("whole.mov"), _NUM_FRAMES + 7, fps=24), path, Fraction(7, 24))
    path.with_name("whole.mov").unlink()


# How a source is drawn, the second at which each of its frames begins and the last ends, and its first number.
_ENDS = [*(Fraction(t, 1000) for t in _UNEVEN), Fraction(_UNEVEN[-1] + 40, 1000)]
_SOURCES = {
    **{str(fps): (constant(fps), [i / Fraction(fps) for i in range(_NUM_FRAMES + 1)], 0) for fps in (12, 16, 24, 60)},
    "30000/1001": (constant("30000/1001"), [i / Fraction(30000, 1001) for i in range(_NUM_FRAMES + 1)], 0),
    "uneven": (lambda path: draw_video(path, _NUM_FRAMES, times=_UNEVEN), _ENDS, 0),
    "turned": (
        lambda path: draw_video(path, _NUM_FRAMES, size=(48, 64), fps=24, draw=draw_turned, turned=90),
        [i / Fraction(24) for i in range(_NUM_FRAMES + 1)],
        0,
    ),
    "edited": (draw_cut, [i / Fraction(24) for i in range(_NUM_FRAMES + 1)], 7),
    "reordered": (
        lambda path: draw_video(path, _NUM_FRAMES, fps=25, options={"bf": "3", "g": "12"}),
        [i / Fraction(25) for i in range(_NUM_FRAMES + 1)],
        0,
    ),
}


def draw_turned(number, width, height):
    return np.ascontiguousarray(np.rot90(draw_frame(number, height, width), -1))


def loaded_clips(folder, keys):
    (config,) = read_config(
        write_toml(
            folder.parent / "data.toml",
            f"[general]\nresolution = [64, 48]\n[[datasets]]\nvideo_directory = '{folder}'\n{keys}",
        )
    )
    clips = plan_clips(config, list_items(config, allow_missing_captions=True)).clips
    return list(zip(clips, load_clips(clips), strict=True))


@pytest.mark.parametrize("name", _SOURCES)
def test_every_extraction_takes_the_planned_frames(tmp_path, name):
    draw, times, first = _SOURCES[name]
    folder = tmp_path / "clips"
    folder.mkdir()
    draw(folder / "a.mp4")
    if name == "uneven":
        # How long the last frame of reordered ones stays is the container's choice.
        times = [*times[:-1], Fraction(probe(folder / "a.mp4", with_times=True).times[-1])]
        assert 0 < times[-1] - times[-2] < Fraction(1, 8)
    steps = [Fraction(k, 16) for k in range(4000) if Fraction(k, 16) < times[-1] - Fraction(11, 10000)]
    expected = [shown(step, times[:-1]) + first for step in steps]
    for extraction in EXTRACTIONS:
        keys = (
            f'source_fps = "auto"\ntarget_frames = [5, 13]\nframe_extraction = "{extraction}"\n'
            "frame_stride = 3\nframe_sample = 3\nmax_frames = 20"
        )
        for clip, images in loaded_clips(folder, keys):
            wanted = expected[clip.start : clip.start + clip.num_frames]
            assert [read_number(image) for image in images] == wanted, (extraction, clip.start)


def test_times_come_from_the_packets(tmp_path):
    path = draw_video(tmp_path / "a.mkv", _NUM_FRAMES, times=_UNEVEN)
    info = probe(path, with_times=True)
    assert info.times[:-1] == pytest.approx([t / 1000 for t in _UNEVEN], abs=1e-3)
    assert len(info.times) == info.num_frames + 1 == _NUM_FRAMES + 1
    assert probe(path).times == ()


def test_reordered_frames_without_stamps_of_their_own_have_times(tmp_path):
    path = draw_video(tmp_path / "a.avi", 30, fps=24, codec="mpeg4", options={"bf": "2"})
    assert probe(path, with_times=True).times == pytest.approx([i / 24 for i in range(31)], abs=2e-3)


def test_a_folder_of_images_is_a_video_at_16_a_second(tmp_path):
    frames = tmp_path / "clips" / "walk"
    frames.mkdir(parents=True)
    for number in range(12):
        Image.fromarray(draw_frame(number)).save(frames / f"{number}.png")
    (tmp_path / "clips" / "walk.txt").write_text("a walk")
    for keys, expected in (("", range(9)), ('source_fps = "auto"', range(9)), ("source_fps = 24", (0, 2, 3, 5, 6))):
        ((clip, images),) = loaded_clips(frames.parent, f"target_frames = [{len(expected)}]\n{keys}")
        assert [read_number(image) for image in images] == list(expected)
        assert clip.item.caption == "a walk"


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animations_are_videos(tmp_path, suffix):
    folder = tmp_path / "clips"
    folder.mkdir()
    images = [Image.fromarray(draw_frame(number)) for number in range(10)]
    lengths = [60] * 5 + [130] * 5
    options = {"lossless": True} if suffix == "webp" else {}
    images[0].save(folder / f"a.{suffix}", save_all=True, append_images=images[1:], duration=lengths, **options)
    times = [sum(lengths[:i]) / 1000 for i in range(11)]
    info = probe(folder / f"a.{suffix}", with_times=True)
    assert (info.width, info.height, info.num_frames) == (64, 48, 10)
    assert info.times == pytest.approx(times)
    ((_, found),) = loaded_clips(folder, 'target_frames = [13]\nsource_fps = "auto"')
    assert [read_number(image) for image in found] == list(timed_frames(times)[:13])


def test_a_still_webp_is_no_video(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    draw_video(folder / "a.mp4", 5)
    draw_image(folder / "b.webp")
    assert len(loaded_clips(folder, "target_frames = [5]")) == 1
