import json
from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image

from cache_tools.plan import describe_plans, format_table, total
from cache_tools.settings import LATENTS_TOOL
from dataset.config import read_config
from dataset.reading.media import load_clips
from dataset.sources import list_items, plan_clips
from tests.unit.dataset.drawing import cut_at_key, draw_image, draw_video, make_clips, write_toml
from wan_train.cli import run
from wan_train.conditions.camera import ORIGIN

TOML = """
[general]
resolution = [64, 48]
[[datasets]]
video_directory = "clips"
cache_directory = "cache"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_clips(tmp_path / "clips", {"a": 32, "b": 6})
    return tmp_path


def describe(more: str):
    (config,) = read_config(write_toml(Path("data.toml"), TOML + more))
    return describe_plans([plan_clips(config, list_items(config, allow_missing_captions=True))])[0]


def tell(*more: str) -> int:
    return run(LATENTS_TOOL, ["--dataset_config", "data.toml", *more])


@pytest.mark.parametrize(
    ("keys", "used", "why"),
    [
        ("target_frames = [5, 17]", 17, "head uses the start only"),
        ("target_frames = [9]\nframe_extraction = 'chunk'", 27, "the remainder at the end is too short"),
        (
            "target_frames = [9]\nframe_extraction = 'slide'\nframe_stride = 4",
            29,
            "the remainder at the end is too short",
        ),
        ("target_frames = [9]\nframe_extraction = 'uniform'\nframe_sample = 2", 18, "between and around the samples"),
        ("frame_extraction = 'full'\nmax_frames = 21", 21, "after max_frames"),
        ("frame_extraction = 'full'", 29, "clip lengths are 4n+1"),
    ],
)
def test_each_mode_tells_what_it_uses_and_why_the_rest_is_lost(keys, used, why):
    long = describe(keys).files[0]
    assert (long.fps_in, long.fps_out, long.frames, long.why) == (16, 16, 32, why)
    assert long.seconds == 2 and long.seconds_used == pytest.approx(used / 16)
    assert long.seconds_lost == pytest.approx((32 - used) / 16)


def test_nothing_lost_has_no_reason():
    (file, _) = describe("target_frames = [1]\nframe_extraction = 'chunk'").files
    assert (file.clips, file.seconds_lost, file.why) == (32, 0, "")


def test_rates_are_those_of_the_file_and_of_its_clips(folder):
    draw_video(folder / "clips/fast.mp4", 60, fps=30)
    rates = {}
    for rate in ('"auto"', "30", "60"):
        by_name = {file.path: file for file in describe(f"target_frames = [1]\nsource_fps = {rate}").files}
        fast = by_name["clips/fast.mp4"]
        rates[rate] = (fast.fps_in, fast.fps_out, fast.frames, fast.frames_at_rate)
    assert rates == {'"auto"': (30, 16, 60, 32), "30": (30, 16, 60, 32), "60": (30, 8, 60, 16)}
    table = format_table([describe("target_frames = [1]\nsource_fps = 30")])
    assert "30 > 16" in table and "16 > 8.5" in table
    assert "different speed: a.mp4, b.mp4" in table


def test_what_yields_nothing_is_named():
    plan = describe("target_frames = [17, 81]")
    table = format_table([plan])
    assert "no clips from 1 of 2 files: b.mp4 (shorter than 17 frames)" in table
    assert "no file is long enough for these target_frames: 81" in table
    assert total([plan])["files_without_clips"] == 1


def test_a_bucket_that_drop_last_empties_is_named():
    plan = describe("target_frames = [5]\nbatch_size = 3\ndrop_last = true")
    assert [(bucket.samples, bucket.batches) for bucket in plan.buckets] == [(2, 0)]
    assert "dropped by drop_last" in format_table([plan])


def test_weights_share_out_the_epoch_as_training_does():
    text = TOML + "target_frames = [5]\nweight = 3\n"
    text += '[[datasets]]\nvideo_directory = "clips"\ncache_directory = "other"\ntarget_frames = [5]'
    configs = read_config(write_toml(Path("data.toml"), text))
    plans = [plan_clips(config, list_items(config, allow_missing_captions=True)) for config in configs]
    assert [plan.buckets[0].samples for plan in describe_plans(plans)] == [3, 1]


def test_samples_batches_and_coverage_are_summed(folder):
    (folder / "stills").mkdir()
    draw_image(folder / "stills/s.png")
    plan = describe("target_frames = [5]\nnum_repeats = 3\nbatch_size = 4")
    (bucket,) = plan.buckets
    assert (bucket.size, bucket.frames, bucket.clips, bucket.samples, bucket.batches) == ((64, 48), 5, 2, 6, 2)
    sums = total([plan])
    assert sums["coverage"] == pytest.approx(10 / 38)
    assert (sums["files"], sums["clips"], sums["samples"], sums["batches"]) == (2, 2, 6, 2)


def test_the_table_fits_a_terminal_and_needs_no_model(folder, capsys):
    make_clips(folder / "clips", {"a_very_long_name_that_a_camera_gave_0001": 40}, fps=30)
    describe('target_frames = [5]\nsource_fps = "auto"')
    assert tell("--plan") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[2].split() == ["a.mp4", "16", ">", "16", "32", "1", "64", "x", "48", "0.3", "1.7"]
    assert lines[-2].startswith("total: 3 files, 3 clips") and lines[-1].endswith("%")
    assert not list(folder.glob("cache/*.safetensors"))


@pytest.mark.parametrize("to_file", [True, False])
def test_programs_read_the_same_facts(folder, capsys, to_file):
    plan = describe("target_frames = [5]")
    assert tell("--plan_json", "plan.json" if to_file else "-") == 0
    out = capsys.readouterr().out
    found = json.loads((folder / "plan.json").read_text() if to_file else out)
    assert to_file == out.startswith("dataset 1")
    (dataset,) = found["datasets"]
    assert [file["path"] for file in dataset["files"]] == ["clips/a.mp4", "clips/b.mp4"]
    assert dataset["files"][0]["seconds_lost"] == plan.files[0].seconds_lost
    assert dataset["buckets"] == [{"size": [64, 48], "frames": 5, "clips": 2, "samples": 2, "batches": 2}]
    assert found["total"] == total([plan]) and found["version"] == 1


def test_a_broken_file_is_named_and_skipped_on_demand(folder, capsys):
    describe("target_frames = [5]")
    (folder / "clips/broken.mp4").write_bytes(b"no video")
    (folder / "clips/broken.txt").write_text("text")
    assert tell("--plan") == 2
    assert "broken.mp4" in capsys.readouterr().err
    assert tell("--plan", "--skip_broken") == 0
    assert "broken.mp4 (cannot be read)" in capsys.readouterr().out


def test_images_have_no_seconds(folder, capsys):
    (folder / "stills").mkdir()
    draw_image(folder / "stills/s.png", (100, 50))
    (folder / "stills/s.txt").write_text("a still")
    (folder / "data.toml").write_text('[[datasets]]\nimage_directory = "stills"\nresolution = 64')
    assert tell("--plan") == 0
    out = capsys.readouterr().out
    assert "s.png" in out and "64 x 64" in out and "%" not in out


def test_what_is_done_to_pixels_and_what_is_not_read_is_named(folder, capsys):
    draw_video(folder / "clips/dv.mp4", 9, aspect=Fraction(2))
    for name, mode in (("cut_out", "RGBA"), ("plain", "RGB")):
        (folder / "stills").mkdir(exist_ok=True)
        draw_image(folder / f"stills/{name}.png", mode=mode)
    (folder / "stills/phone.heic").write_bytes(b"")
    keys = "target_frames = [5]\nenable_bucket = true\n[[datasets]]\nimage_directory = 'stills'\n"
    write_toml(Path("data.toml"), f'{TOML}{keys}alpha_background = "#102030"')
    assert tell("--plan", "--allow_missing_captions") == 0
    out = capsys.readouterr().out.splitlines()
    assert "non-square pixels (2:1), scaled to the displayed width: 1 of 3 files: dv.mp4" in out
    assert "transparency, composed on alpha_background #102030: 1 of 2 files: cut_out.png" in out
    assert "ignored: 1 files: phone.heic (.heic is not supported)" in out
    row = next(line for line in out if line.startswith("dv.mp4"))
    assert "96 x 32" in row  # 128 by 48 as shown
    assert tell("--plan_json", "-", "--allow_missing_captions") == 0
    videos, stills = json.loads(capsys.readouterr().out)["datasets"]
    assert [file["reading"] for file in videos["files"]] == [[], [], ["pixels 2:1"]]
    assert stills["unread"] == [{"path": "stills/phone.heic", "reason": ".heic is not supported"}]


def test_what_goes_with_each_file_is_told(folder, capsys):
    for name in ("controls", "references", "masks", "losses"):
        (folder / name).mkdir()
    draw_video(folder / "controls/a.mp4", 32)
    draw_video(folder / "masks/a.mp4", 32)
    for name in ("references/a.png", "references/a_1.png", "losses/a.png", "masks/b.png"):
        draw_image(folder / name)
    keys = 'target_frames = [5]\ncontrol_directory = "controls"\nreference_directory = "references"\n'
    keys += 'mask_directory = "masks"\nloss_mask_directory = "losses"\nmotion_bucket_id = 0\n'
    write_toml(Path("data.toml"), TOML + keys)
    assert tell("--plan", "--task", "vace-1.3B") == 0
    lines = capsys.readouterr().out.splitlines()
    told = "control controls/a.mp4; reference references/a.png, references/a_1.png; loss mask losses/a.png"
    assert f"with a.mp4: {told}; VACE mask masks/a.mp4; motion bucket 0" in lines
    assert "with b.mp4: VACE mask masks/b.png; motion bucket 0" in lines
    assert tell("--plan_json", "-", "--task", "vace-1.3B") == 0
    found = json.loads(capsys.readouterr().out)
    a, b = (file["partners"] for file in found["datasets"][0]["files"])
    assert found["version"] == 1
    assert a == {
        "controls": ["controls/a.mp4"],
        "references": ["references/a.png", "references/a_1.png"],
        "mask": "losses/a.png",
        "vace_mask": "masks/a.mp4",
        "camera": None,
        "motion_bucket_id": 0,
    }
    assert (b["controls"], b["references"], b["mask"], b["vace_mask"]) == ([], [], None, "masks/b.png")


def test_the_camera_path_of_each_file_is_told(folder, capsys):
    (folder / "cameras").mkdir()
    (folder / "cameras/a.txt").write_text((" ".join(map(str, ORIGIN)) + "\n") * 32)
    keys = 'target_frames = [5]\ncamera_directory = "cameras"\ncamera_direction = "LeftUp"\ncamera_speed = 0.02\n'
    write_toml(Path("data.toml"), TOML + keys)
    assert tell("--plan", "--task", "fun-camera-A14B") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "with a.mp4: camera cameras/a.txt" in lines and "with b.mp4: camera LeftUp at 0.02" in lines
    assert tell("--plan_json", "-", "--task", "fun-camera-A14B") == 0
    files = json.loads(capsys.readouterr().out)["datasets"][0]["files"]
    assert files[0]["partners"]["camera"]["path"] == "cameras/a.txt"
    assert files[1]["partners"]["camera"] == {"path": None, "direction": "LeftUp", "speed": 0.02}


def test_a_misfit_and_a_key_that_the_task_does_not_read_end_the_plan(folder, capsys):
    (folder / "controls").mkdir()
    for name, frames in (("a", 32), ("b", 4)):
        draw_video(folder / f"controls/{name}.mp4", frames)
    write_toml(Path("data.toml"), TOML + 'target_frames = [5]\ncontrol_directory = "controls"\n')
    assert tell("--plan", "--task", "fun-control-1.3B") == 2
    assert "controls/b.mp4 has 4 frames, but the clips of clips/b.mp4 use 5 of its 6" in capsys.readouterr().err
    assert tell("--plan", "--task", "fun-camera-A14B") == 2
    assert "control_directory: the task does not use a control video" in capsys.readouterr().err
    assert tell("--plan") == 0


def test_frames_that_do_not_decode_are_told_in_the_plan(folder, capsys):
    options = {"x264-params": "open-gop=1:scenecut=0:keyint=12:min-keyint=12:b-adapt=0:bframes=3"}
    cut_at_key(draw_video(folder / "whole.mkv", 43, options=options), folder / "clips/cut.mkv")
    describe("frame_extraction = 'full'")
    assert tell("--plan", "--allow_missing_captions") == 0
    told = capsys.readouterr()
    assert "frames that cannot be decoded: cut.mkv (3)" in told.out
    assert "1 videos begin in the middle of a GOP" in told.err and "cut.mkv (3 of 34)" in told.err
    (row,) = (line for line in told.out.splitlines() if line.startswith("cut.mkv") and "64 x 48" in line)
    assert row.split()[4:6] == ["31", "1"]


@pytest.mark.parametrize("kind", ["image", "animation"])
def test_an_image_in_a_list_of_videos_is_one_frame_at_any_rate(folder, kind):
    path = folder / ("still.png" if kind == "image" else "still.gif")
    Image.new("RGB", (64, 48)).save(path)
    (folder / "list.csv").write_text(f"video,prompt\n{path.name},a still\n")
    for rate in ('"auto"', "24"):
        text = TOML.replace('video_directory = "clips"', 'video_csv_file = "list.csv"') + f"source_fps = {rate}"
        (config,) = read_config(write_toml(Path("data.toml"), text))
        (clip,) = plan_clips(config, list_items(config, allow_missing_captions=True)).clips
        assert clip.frames == (0,) and load_clips([clip])[0].shape == (1, 48, 64, 3)


def test_names_too_long_for_the_file_system_are_found_in_the_plan(folder, capsys, monkeypatch):
    describe("target_frames = [5]")
    (folder / "clips" / f"{'x' * 240}.mp4").write_bytes((folder / "clips/a.mp4").read_bytes())
    assert tell("--plan", "--allow_missing_captions") == 0
    capsys.readouterr()
    # As eCryptfs has it.
    monkeypatch.setattr("wan_train.file_names._is_too_long", lambda path: len(path.name) > 143)
    assert tell("--plan", "--allow_missing_captions") == 2
    told = capsys.readouterr().err
    assert "cannot write cache/xxx" in told and "is too long (" in told
    assert "rename xxx" in told and "or set cache_directory to another file system" in told
