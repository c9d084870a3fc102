"""Control videos that are made of the clips: what they show, where they go, and that none is ever half there."""

import os
import signal
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from cache_tools.make_control import MAKERS
from cache_tools.settings import LATENTS_TOOL, MADE
from dataset.config import read_config
from dataset.reading.media import probe, read_frames
from dataset.sources import list_items, plan_clips
from tests import processes
from tests.unit.dataset.drawing import draw_frame, draw_image, draw_noise, draw_video, make_clips, write_toml
from wan_train.cli import run
from wan_train.models.variants import VARIANTS

KILLED = "tests/unit/cache_tools/make_controls_killed.py"
TOML = '[[datasets]]\nvideo_directory = "clips"\nresolution = [64, 48]\ntarget_frames = [5]\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_clips(tmp_path / "clips", {"a": 9})
    write_toml(Path("data.toml"), TOML)
    return tmp_path


def make(kind="canny", *more):
    return run(LATENTS_TOOL, ["--dataset_config", "data.toml", "--make_control", kind, *more])


def images_of(path):
    return [image for _, image in read_frames(path, range(probe(path).num_frames))]


def test_the_choices_are_those_that_can_be_made():
    assert tuple(MAKERS) == MADE


def test_canny_draws_the_edges_of_stripes_white():
    image = draw_frame(0b00000100)  # white from x = 16 to 24
    edges = MAKERS["canny"](image)
    assert edges.shape == image.shape and set(np.unique(edges)) == {0, 255}
    drawn = np.unique(np.nonzero(edges)[1])
    assert len(drawn) == 2 and abs(drawn[0] - 16) <= 1 and abs(drawn[1] - 24) <= 1
    faint = np.full((48, 64, 3), 100, np.uint8)
    faint[:, 32:] += 20  # a gradient of 4 * 20, below the lower threshold
    assert not MAKERS["canny"](faint).any()


def test_gray_has_the_luma_of_rec_601_in_all_channels():
    image = draw_noise(0, 64, 48)
    grey = MAKERS["gray"](image)
    luma = image @ np.array([0.299, 0.587, 0.114])
    assert np.abs(grey - luma[..., None]).max() <= 1


def test_blur_is_a_gaussian_of_five_pixels():
    image = np.zeros((81, 81, 3), np.uint8)
    image[:, 40:] = 255
    row = MAKERS["blur"](image)[40, :, 0].astype(float) / 255
    slope = np.diff(row)
    assert slope.max() == pytest.approx(1 / (5 * np.sqrt(2 * np.pi)), rel=0.1)
    assert row[35] == pytest.approx(0.18, abs=0.03)  # 5 pixels before the edge: the normal distribution at -0.9


def test_tiles_have_the_mean_of_their_pixels():
    image = draw_noise(0, 64, 48)
    tiled = MAKERS["tile"](image).astype(float)
    for y, x in ((0, 0), (8, 16), (40, 56)):
        tile = tiled[y : y + 8, x : x + 8]
        assert (tile == tile[0, 0]).all()
        assert np.abs(tile[0, 0] - image[y : y + 8, x : x + 8].mean(axis=(0, 1))).max() <= 1
    assert MAKERS["tile"](draw_noise(0, 50, 30)).shape == (30, 50, 3)
    assert MAKERS["tile"](draw_noise(0, 3, 2)).shape == (2, 3, 3)


@pytest.mark.parametrize("kind", MADE)
def test_each_video_has_a_control_of_all_its_frames_without_loss(folder, kind):
    draw_video(folder / "clips/b.mp4", 7, size=(66, 50), fps=Fraction(30000, 1001), draw=draw_noise)
    assert make(kind) == 0
    assert sorted(path.name for path in (folder / "clips_control").iterdir()) == ["a.mp4", "b.mp4"]
    for name in ("a", "b"):
        clip, control = folder / f"clips/{name}.mp4", folder / f"clips_control/{name}.mp4"
        of_clip, of_control = probe(clip, with_times=True), probe(control, with_times=True)
        assert (of_control.width, of_control.height, of_control.num_frames) == (
            of_clip.width,
            of_clip.height,
            of_clip.num_frames,
        )
        assert of_control.fps == pytest.approx(of_clip.fps, abs=1e-6)
        assert of_control.times == pytest.approx(of_clip.times, abs=2e-3)
        for image, drawn in zip(images_of(clip), images_of(control), strict=True):
            assert np.array_equal(drawn, MAKERS[kind](image))


def test_what_was_made_goes_with_the_clips_that_training_takes(folder, capsys):
    assert make() == 0
    told = capsys.readouterr().err
    assert 'wrote 1 controls to clips_control, kept 0 existing ones; add control_directory = "clips_control"' in told
    row = VARIANTS["fun-control-1.3B"]
    text = f'{TOML}control_directory = "clips_control"'
    (config,) = read_config(write_toml(Path("data.toml"), text), images=row.images, control=row.control)
    (clip,) = plan_clips(config, list_items(config, allow_missing_captions=False)).clips
    assert clip.item.control == Path("clips_control/a.mp4")


def test_controls_go_into_the_datasets_own_folder_and_those_there_are_kept(folder, capsys):
    make_clips(folder / "clips", {"b": 5})
    write_toml(Path("data.toml"), f'{TOML}control_directory = "mine/controls"')
    (folder / "mine/controls").mkdir(parents=True)
    mine = draw_video(folder / "mine/controls/a.mkv", 9)
    before = mine.read_bytes()
    assert make() == 0
    assert sorted(path.name for path in (folder / "mine/controls").iterdir()) == ["a.mkv", "b.mp4"]
    assert mine.read_bytes() == before and not (folder / "clips_control").exists()
    told = capsys.readouterr().err
    assert "wrote 1 controls to mine/controls, kept 1 existing ones" in told and "add control_directory" not in told
    stamp = (folder / "mine/controls/b.mp4").stat().st_mtime_ns
    assert make("gray") == 0
    assert (folder / "mine/controls/b.mp4").stat().st_mtime_ns == stamp


def test_a_folder_of_controls_that_is_not_there_is_made_and_passed_over_as_media(folder):
    write_toml(Path("data.toml"), f'{TOML}recursive = true\ncontrol_directory = "clips/controls"')
    for _ in range(2):
        assert make() == 0
        assert [path.name for path in (folder / "clips/controls").iterdir()] == ["a.mp4"]


def test_images_have_images_and_a_frame_folder_a_video(folder):
    (folder / "stills").mkdir()
    draw_image(folder / "stills/s.jpg", (50, 30))
    (folder / "clips/walk").mkdir()
    for number in range(3):
        draw_image(folder / f"clips/walk/{number}.png")
    write_toml(Path("data.toml"), f'{TOML}[[datasets]]\nimage_directory = "stills"\nresolution = 32\n')
    assert make("gray") == 0
    assert [path.name for path in (folder / "stills_control").iterdir()] == ["s.png"]
    drawn = cv2.imread(str(folder / "stills_control/s.png"))
    assert drawn.shape == (30, 50, 3)
    assert (folder / "clips_control/walk.mp4").is_file() and probe(folder / "clips_control/walk.mp4").num_frames == 3


def test_the_controls_of_a_list_lie_beside_it(folder):
    (folder / "lists").mkdir()
    (folder / "lists/mine.jsonl").write_text('{"video_path": "clips/a.mp4", "caption": "a"}\n')
    text = TOML.replace('video_directory = "clips"', 'video_jsonl_file = "lists/mine.jsonl"\ncache_directory = "cache"')
    write_toml(Path("data.toml"), text)
    assert make() == 0
    assert [path.name for path in (folder / "lists/mine_control").iterdir()] == ["a.mp4"]


def test_a_broken_file_is_named_and_skipped_on_demand(folder, capsys):
    whole = (folder / "clips/a.mp4").read_bytes()
    (folder / "clips/b.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    assert make() == 2
    assert "clips/b.mp4" in capsys.readouterr().err
    assert make("canny", "--skip_broken") == 0
    assert "skipped: clips/b.mp4" in capsys.readouterr().err
    assert [path.name for path in (folder / "clips_control").iterdir()] == ["a.mp4"]


def test_files_of_one_name_are_refused(folder, capsys):
    make_clips(folder / "clips/below", {"a": 9})
    write_toml(Path("data.toml"), f"{TOML}recursive = true")
    assert make() == 2
    assert "clips/a.mp4 and clips/below/a.mp4" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_a_control_is_whole_or_not_there(folder):
    make_clips(folder / "clips", {"b": 5})
    write_toml(folder / "whole.toml", TOML.replace('"clips"', f'"{folder}/clips"'))
    codes = []
    while not codes or codes[-1]:
        started = processes.start(KILLED, folder / "whole.toml", len(codes))
        codes.append(started.wait())
        visible = sorted((folder / "clips_control").glob("[!.]*"))
        assert [probe(path).num_frames for path in visible] == [9, 5][: len(visible)]
    assert codes[:-1] == [-signal.SIGKILL] * (len(codes) - 1) and len(codes) > 2
    assert [path.name for path in sorted((folder / "clips_control").iterdir())] == ["a.mp4", "b.mp4"]
