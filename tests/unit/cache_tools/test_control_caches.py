"""Caches of control models: what is in them, when they are stale, which samples share a batch, and old ones."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from cache_tools.settings import LATENTS_TOOL
from dataset.batching.batches import CachedDataset, bucket_of, collate, open_cached, open_trusted
from dataset.batching.epochs import EpochBatches
from dataset.batching.order import Pick
from dataset.caching.cache import latents_path, read_extra, save_text
from dataset.caching.contents import changes, read_contents
from dataset.config import DatasetConfig, read_config
from dataset.reading.opening import check_caches
from dataset.sources import ClipPlan, list_items, plan_clips
from tests.unit.dataset.drawing import draw_noise, draw_video, make_clips, write_toml
from wan_train.cli import run
from wan_train.conditions.camera import camera_path, mirrored
from wan_train.errors import InputError
from wan_train.models.variants import VARIANTS
from wan_train.storage import read_header, read_tensors, save_tensors

TOML = """
[[datasets]]
video_directory = "clips"
cache_directory = "cache"
resolution = [64, 48]
target_frames = [5]
batch_size = 2
"""
CONTROL, REFERENCE, MASK = (f'{name}_directory = "{name}s"\n' for name in ("control", "reference", "mask"))
CAMERAS = 'camera_directory = "cameras"\n'
ENTRY = "0 0.5 0.9 0.4 0.5 0 0 1 0 0 0.1 0 1 0 0.2 0 0 1 0.3\n"

Cache = Callable[..., int]
ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_clips(tmp_path / "clips", {"a": 6, "b": 6})
    for name in ("controls", "references", "masks", "cameras"):
        (tmp_path / name).mkdir()
    for number, stem in enumerate("ab"):
        draw(tmp_path / "controls" / f"{stem}.mkv", 10 + number)
        draw(tmp_path / "masks" / f"{stem}.mkv", 20 + number)
        Image.fromarray(draw_noise(30 + number, 40, 56)).save(tmp_path / "references" / f"{stem}.png")
        (tmp_path / "cameras" / f"{stem}.txt").write_text(ENTRY * 6)
    return tmp_path


def draw(path: Path, seed: int) -> None:
    draw_video(path, 6, codec="ffv1", pix_fmt="bgr0", draw=lambda n, *size: draw_noise(100 * seed + n, *size))


@pytest.fixture
def cache(vae_path: Path, folder: Path) -> Cache:
    def start(task: str, lines: str, *more: str) -> int:
        write_toml(folder / "data.toml", TOML + lines)
        files = ["--vae", str(vae_path), "--device", "cpu", "--vae_dtype", "fp32"]
        given = ["--task", task] if task else []
        return run(LATENTS_TOOL, ["--dataset_config", "data.toml", *given, *files, *more])

    return start


def configs_of(task: str) -> tuple[DatasetConfig, ...]:
    variant = VARIANTS[task]
    return read_config("data.toml", images=variant.images, control=variant.control)


def plan_of(task: str) -> ClipPlan:
    (config,) = configs_of(task)
    plan = plan_clips(config, list_items(config, allow_missing_captions=False))
    for item in plan.items:
        save_text(item, {item.caption: torch.zeros(2, 8)})
    return plan


def names_in(plan: ClipPlan) -> set[str]:
    """The kinds of the tensors in a clip's file, without size and dtype."""
    keys = read_header(latents_path(plan.clips[0])).shapes
    return {"_".join(w for w in key.split("_")[:-1] if not w[0].isdigit()) for key in keys}


def encoded(capsys: pytest.CaptureFixture[str]) -> int:
    return int(capsys.readouterr().err.strip().splitlines()[-1].split(" encoded")[0].rpartition(" ")[2])


@pytest.mark.parametrize(
    ("task", "lines", "names"),
    [
        ("fun-control-A14B", CONTROL, {"latents_control"}),
        ("fun-control-A14B", CONTROL + REFERENCE, {"latents_control", "latents_reference"}),
        ("fun-control-A14B", CONTROL + "start_image = true\n", {"latents_control", "latents_image"}),
        ("fun-control-1.3B", CONTROL, {"latents_control"}),
        ("fun-camera-A14B", CAMERAS, {"camera", "latents_image"}),
        ("vace-1.3B", CONTROL + MASK + REFERENCE, {"vace_context"}),
        ("vace-1.3B", "", {"vace_context"}),
        ("t2v-1.3B", "motion_bucket_id = 40\n", {"motion_bucket"}),
        ("", CONTROL, {"latents_control"}),
    ],
)
@pytest.mark.parametrize("flips", [False, True])
def test_each_task_caches_what_it_reads(
    cache: Cache, task: str, lines: str, names: set[str], flips: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    lines += "flip_augment = true\n" * flips
    assert cache(task, lines) == 0
    assert encoded(capsys) == 2
    plan = plan_of(task or "t2v-1.3B")
    mirrored_names = {f"{name}_flipped" for name in names if name != "motion_bucket"} | {"latents_flipped"}
    assert names_in(plan) == {"latents", *names} | (mirrored_names if flips else set())
    assert cache(task, lines) == 0
    assert encoded(capsys) == 0


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("fun-control-14B", "--task fun-control-1.3B --clip ...`"),
        ("i2v-14B-FC", "--task i2v-14B-FC --clip ...`"),
        ("fun-camera-14B", "--task fun-camera-1.3B --clip ...`"),
        ("vace-14B", "--task vace-1.3B`"),
        ("fun-control-A14B", "--task fun-control-A14B`"),
        ("fun-camera-A14B", "--task fun-camera-A14B`"),
        ("fun-inp-A14B", "--task i2v-A14B`"),
        ("t2v-14B", "--vae ...`"),
    ],
)
def test_training_names_the_command_that_makes_what_is_missing(folder: Path, task: str, told: str) -> None:
    write_toml(folder / "data.toml", TOML + CAMERAS * ("camera" in task))
    with pytest.raises(InputError, match=re.escape(told)):
        check_caches([plan_of(task)], "--dataset_config data.toml")


@pytest.mark.parametrize(
    ("task", "line", "told"),
    [
        ("t2v-1.3B", CONTROL, "control_directory: the task does not use a control video: remove it"),
        ("i2v-A14B", CONTROL, "control_directory: the task does not use a control video: remove it"),
        ("fun-inp-A14B", REFERENCE, "reference_directory: the task does not use a reference image: remove it"),
        ("t2v-1.3B", 'camera_direction = "Left"\n', "camera_direction: the task does not use a camera path: remove it"),
        ("t2v-1.3B", "start_image = true\n", "start_image: the task does not use a start image: remove it"),
    ],
)
def test_what_a_plain_task_does_not_read_is_refused(
    cache: Cache, task: str, line: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache(task, line) == 2
    assert told in capsys.readouterr().err


def test_mirrored_conditions_are_those_of_mirrored_files(cache: Cache, folder: Path) -> None:
    """The mirrored context is that of a dataset in which every file is mirrored."""
    lines = CONTROL + MASK + REFERENCE
    assert cache("vace-1.3B", lines + "flip_augment = true\n") == 0
    flipped = read_extra(plan_of("vace-1.3B").clips[0], "vace_context_flipped")
    for name in ("controls", "masks"):
        seed = {"controls": 10, "masks": 20}[name]
        draw_video(
            folder / name / "a.mkv",
            6,
            codec="ffv1",
            pix_fmt="bgr0",
            draw=lambda n, *size, seed=seed: draw_noise(100 * seed + n, *size)[:, ::-1].copy(),
        )
    image = Image.open(folder / "references/a.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "references/a.png")
    assert cache("vace-1.3B", lines) == 0
    assert torch.equal(read_extra(plan_of("vace-1.3B").clips[0], "vace_context"), flipped)


def test_cameras_are_taken_at_the_frames_of_the_clip(cache: Cache, folder: Path) -> None:
    lines = "".join(ENTRY.replace("0.1", str(k)) for k in range(6))
    (folder / "cameras/a.txt").write_text(lines)
    assert cache("fun-camera-A14B", CAMERAS + 'frame_extraction = "slide"\nflip_augment = true\n') == 0
    assert len(plan_of("fun-camera-A14B").clips) == 4
    later = read_extra(plan_of("fun-camera-A14B").clips[1], "camera")
    assert later[:, 10].tolist() == [1, 2, 3, 4, 5]
    entries = read_extra(plan_of("fun-camera-A14B").clips[0], "camera")
    assert entries.shape == (5, 19) and entries[:, 10].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(read_extra(plan_of("fun-camera-A14B").clips[0], "camera_flipped"), mirrored(entries))


def test_a_camera_by_direction(cache: Cache) -> None:
    assert cache("fun-camera-A14B", 'camera_direction = "RightUp"\ncamera_speed = 0.125\n') == 0
    entries = read_extra(plan_of("fun-camera-A14B").clips[1], "camera")
    assert torch.equal(entries, camera_path("RightUp", 5, 0.125))


def test_a_camera_file_that_is_too_short_is_named(
    cache: Cache, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "cameras/b.txt").write_text(ENTRY * 4)
    assert cache("fun-camera-A14B", CAMERAS) == 2
    assert "b.txt" in capsys.readouterr().err


REDRAW = {
    "control": lambda: draw(Path("controls/a.mkv"), 77),
    "reference": lambda: Image.fromarray(draw_noise(9, 40, 56)).save("references/a.png"),
    "vace_mask": lambda: draw(Path("masks/a.mkv"), 78),
    "camera": lambda: Path("cameras/a.txt").write_text(ENTRY.replace("0.1", "0.2") * 6),
}


@pytest.mark.parametrize(
    ("task", "lines", "source"),
    [
        ("fun-control-A14B", CONTROL + REFERENCE, "control"),
        ("fun-control-A14B", CONTROL + REFERENCE, "reference"),
        ("vace-1.3B", CONTROL + REFERENCE + MASK, "control"),
        ("vace-1.3B", CONTROL + REFERENCE + MASK, "reference"),
        ("vace-1.3B", CONTROL + REFERENCE + MASK, "vace_mask"),
        ("fun-camera-A14B", CAMERAS, "camera"),
    ],
)
def test_a_changed_file_makes_its_cache_stale(
    cache: Cache, task: str, lines: str, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache(task, lines) == 0
    dataset = CachedDataset([plan_of(task)])
    before = read_contents(dataset)
    REDRAW[source]()
    capsys.readouterr()
    assert cache(task, lines) == 0
    said = capsys.readouterr().err
    assert f"{source} changed" in said and "1 encoded" in said
    assert len(changes(before, read_contents(CachedDataset([plan_of(task)])))) == 1


@pytest.mark.parametrize(
    ("task", "before", "after", "reason"),
    [
        ("fun-control-A14B", CONTROL, CONTROL + REFERENCE, "no latents_reference"),
        ("fun-control-A14B", CONTROL + REFERENCE, CONTROL, "reference removed"),
        ("fun-control-A14B", CONTROL, CONTROL + "start_image = true\n", "no latents_image"),
        ("vace-1.3B", MASK, CONTROL + MASK, "control changed"),
        ("vace-1.3B", CONTROL + MASK, MASK, "control removed"),
        ("vace-1.3B", CONTROL + MASK, CONTROL, "vace_mask removed"),
        ("vace-1.3B", CONTROL, CONTROL + MASK, "vace_mask changed"),
        ("vace-1.3B", CONTROL + REFERENCE, CONTROL, "different number of references"),
        ("fun-camera-A14B", CAMERAS, 'camera_direction = "Left"\n', "camera changed"),
        ("fun-camera-A14B", 'camera_direction = "Left"\n', CAMERAS, "camera changed"),
        ("fun-camera-A14B", 'camera_direction = "Left"\n', 'camera_direction = "Up"\n', "camera changed"),
        (
            "fun-camera-A14B",
            'camera_direction = "Left"\n',
            'camera_direction = "Left"\ncamera_speed = 0.5\n',
            "camera changed",
        ),
        ("t2v-1.3B", "motion_bucket_id = 1\n", "motion_bucket_id = 2\n", "motion bucket changed"),
        ("t2v-1.3B", "", "motion_bucket_id = 2\n", "no motion_bucket"),
    ],
)
def test_another_dataset_file_makes_caches_stale(
    cache: Cache, task: str, before: str, after: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache(task, before) == 0
    capsys.readouterr()
    assert cache(task, after) == 0
    said = capsys.readouterr().err
    assert said.count(reason) == 2 and "2 encoded" in said


def test_caches_of_controls_serve_tasks_without(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache("fun-camera-A14B", CAMERAS) == 0
    capsys.readouterr()
    assert cache("i2v-A14B", "") == 0
    assert encoded(capsys) == 0


def test_what_was_cached_without_a_task_serves_control_models(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache("", CONTROL) == 0
    capsys.readouterr()
    assert cache("fun-control-1.3B", CONTROL) == 0
    said = capsys.readouterr().err
    assert "0 encoded" in said and "2 files have no start or reference image and are cached without CLIP tokens" in said


@pytest.mark.parametrize("lines", ["start_image = true\n", REFERENCE])
def test_clip_is_asked_for_where_images_are_read_through_it(
    cache: Cache, lines: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache("fun-control-1.3B", CONTROL + lines) == 2
    said = capsys.readouterr().err
    assert "--clip is missing" in said and "2 files" in said and not list(Path("cache").glob("*.safetensors"))


def test_batches_mix_only_samples_with_the_same_conditions(cache: Cache, folder: Path) -> None:
    make_clips(folder / "clips", {"c": 6, "d": 6})
    Image.fromarray(draw_noise(40, 40, 56)).save(folder / "references/c_0.png")
    Image.fromarray(draw_noise(41, 40, 56)).save(folder / "references/c_1.png")
    assert cache("vace-1.3B", REFERENCE) == 0
    plan = plan_of("vace-1.3B")
    buckets = {clip.item.path.stem: bucket_of(clip) for clip in plan.clips}
    assert buckets["a"] == buckets["b"] and len(set(buckets.values())) == 3
    dataset = CachedDataset([plan])
    batches = [[dataset[pick] for pick in batch] for batch in EpochBatches(dataset, seed=1)]
    shapes = sorted(tuple(collate(batch).extras["vace_context"].shape[:3]) for batch in batches)
    assert shapes == [(1, 96, 2), (1, 96, 4), (2, 96, 3)]


def test_datasets_without_controls_keep_their_buckets(cache: Cache) -> None:
    assert cache("i2v-A14B", "") == 0
    assert {bucket_of(clip).conditions for clip in plan_of("i2v-A14B").clips} == {()}


@pytest.mark.parametrize(
    ("task", "lines"),
    [
        ("fun-control-A14B", CONTROL + REFERENCE + "start_image = true\nflip_augment = true\n"),
        ("vace-1.3B", CONTROL + REFERENCE + MASK),
        ("vace-1.3B", ""),
        ("fun-camera-A14B", CAMERAS),
        ("t2v-1.3B", "motion_bucket_id = 40\n"),
    ],
)
def test_trusted_caches_give_the_same_samples(cache: Cache, task: str, lines: str) -> None:
    assert cache(task, lines) == 0
    plan_of(task)
    known = open_cached(configs_of(task), allow_missing_captions=False)
    trusted = open_trusted(configs_of(task))
    assert known.buckets.keys() == trusted.buckets.keys()
    for one, other in zip(known, trusted, strict=True):
        assert one.extras.keys() == other.extras.keys() and one.extras
        assert one.has_vace_mask == other.has_vace_mask == ("mask" in lines)
        assert all(torch.equal(value, other.extras[name]) for name, value in one.extras.items())


@pytest.mark.parametrize("key", ["latents_control", "latents_image"])
def test_caches_of_musubi_tuner(cache: Cache, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Files with its names and without a recipe: the start image is the first frame of `latents_image`."""
    assert cache("", CONTROL, "--i2v") == 0
    plan = plan_of("i2v-14B-FC")
    for clip in plan.clips:
        path = latents_path(clip)
        tensors = {name: tensor.clone() for name, tensor in read_tensors(path)}
        metadata = {n: v for n, v in read_header(path).metadata.items() if n != "wan_train_recipe"}
        save_tensors(path, tensors | {"clip_float16": torch.ones(257, 1280, dtype=torch.float16)}, metadata)
    sample = CachedDataset([plan])[Pick(0)]
    assert sample.extras.keys() == {"control_latents", "start_latents", "clip_features"}
    given = read_extra(plan.clips[0], "latents_image")
    assert torch.equal(sample.extras["start_latents"], given[4:, :1])
    open_cached(configs_of("i2v-14B-FC"), allow_missing_captions=False)
    path = latents_path(plan.clips[0])
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path) if not name.startswith(key)}
    save_tensors(path, tensors, {})
    with pytest.raises(ValueError, match="1 of 2"):
        open_cached(configs_of("i2v-14B-FC"), allow_missing_captions=False)


# The command, killed before it puts its nth file in place.
KILLED = """
import os, signal, sys
from cache_tools.settings import LATENTS_TOOL
from wan_train.cli import run
replace, calls, moment = os.replace, iter(range(1000)), int(sys.argv[1])
def counted(*paths, **named):
    if next(calls) == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*paths, **named)
os.replace = counted
sys.exit(run(LATENTS_TOOL, sys.argv[2:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_while_controls_are_cached_nothing_is_half_written(
    cache: Cache, folder: Path, vae_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = CONTROL + REFERENCE + MASK
    write_toml(folder / "data.toml", TOML + lines)
    words = ["--dataset_config", "data.toml", "--task", "vace-1.3B", "--vae", str(vae_path), "--device", "cpu"]
    codes = []
    for moment in (2, 1000):  # each is a start of Python with torch: the second kill, and none
        command = [sys.executable, "-c", KILLED, str(moment), *words, "--vae_dtype", "fp32"]
        codes.append(subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode)
        for path in Path("cache").glob("[!.]*.safetensors"):
            assert any(name.startswith("vace_context_") for name in read_header(path).shapes)
    assert codes[0] != 0 == codes[1]
    capsys.readouterr()
    assert cache("vace-1.3B", lines) == 0
    assert encoded(capsys) == 0 and not list(Path("cache").glob(".*.safetensors*"))
    assert len(plan_of("vace-1.3B").clips) == 2
