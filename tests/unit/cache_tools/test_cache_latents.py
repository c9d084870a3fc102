import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wan_train
from cache_tools.extras import to_pixels
from cache_tools.settings import LATENTS_TOOL
from dataset.batching.batches import open_cached
from dataset.caching.cache import latents_path, read_latents
from dataset.config import read_config
from dataset.reading.media import load_clips
from dataset.sources import list_items, plan_clips
from tests.unit.dataset.drawing import draw_image, draw_video, make_clips, write_toml
from tests.unit.dataset.lookup import has_latents
from wan_train.cli import run
from wan_train.models.vae.tiling import Tiling
from wan_train.storage import read_header

ROOT = Path(__file__).resolve().parents[3]
TOML = """
[general]
resolution = [64, 48]
enable_bucket = true
[[datasets]]
video_directory = "clips"
cache_directory = "cache"
target_frames = [1, 5]
frame_extraction = "uniform"
frame_sample = 2
batch_size = 3
[[datasets]]
image_directory = "stills"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_clips(tmp_path / "clips", {"a": 9, "b": 6})
    make_clips(tmp_path / "clips", {"c": 7}, size=(48, 64))
    (tmp_path / "stills").mkdir()
    draw_image(tmp_path / "stills/s.png", (100, 50))
    (tmp_path / "stills/s.txt").write_text("a still")
    write_toml(tmp_path / "data.toml", TOML)
    return tmp_path


def cache(vae_path, *more):
    return run(LATENTS_TOOL, ["--dataset_config", "data.toml", "--vae", str(vae_path), "--device", "cpu", *more])


def all_clips():
    configs = read_config("data.toml")
    plans = [plan_clips(config, list_items(config, allow_missing_captions=True)) for config in configs]
    return [clip for plan in plans for clip in plan.clips]


class SpyVae:
    """Stands in for the VAE: notes the shapes that it is given."""

    def __init__(self):
        self.calls = []
        self.cache_on_cpu = None
        self.value = 0.5

    def encode(self, pixels):
        assert pixels.dtype == torch.float32 and pixels.min() >= -1 and pixels.max() <= 1
        self.calls.append(tuple(pixels.shape))
        b, _, f, h, w = pixels.shape
        return torch.full((b, 16, 1 + (f - 1) // 4, h // 8, w // 8), self.value)


@pytest.fixture
def spy(monkeypatch):
    spy = SpyVae()
    spy.loads = []
    monkeypatch.setattr(wan_train, "load_vae", lambda *args, **options: spy.loads.append(options) or spy, raising=False)
    return spy


def test_latents_are_those_of_each_clip_encoded_alone(folder, vae_path, capsys):
    assert cache(vae_path) == 0
    error = capsys.readouterr().err
    assert "13 encoded, 0 kept" in error
    assert "64 wide, 48 high, 5 frames: 4" in error
    vae = wan_train.load_vae(vae_path)
    clips = all_clips()
    assert len(clips) == 13
    for clip in clips:
        (images,) = load_clips([clip])
        alone = vae.encode(to_pixels(torch.from_numpy(images)[None]))[0]
        cached = read_latents(clip)
        assert cached.dtype == torch.bfloat16
        torch.testing.assert_close(cached.float(), alone, atol=2e-2, rtol=1e-2)
    assert latents_path(clips[-1]) == Path("stills/s_0100x0050_wan.safetensors")


def test_pixels_go_from_minus_one_to_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 1, 3).expand(1, 2, 4, 5, 3)
    pixels = to_pixels(images)
    assert pixels.shape == (1, 3, 2, 4, 5)
    torch.testing.assert_close(pixels[0, :, 0, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))


def test_what_is_there_is_kept_and_no_model_loaded(folder, vae_path, spy, capsys):
    assert cache(vae_path) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.glob("**/*_wan.safetensors")}
    assert len(before) == 13 and len(spy.loads) == 1
    assert cache(vae_path, "--skip_existing") == 0
    assert "0 encoded, 13 kept" in capsys.readouterr().err
    assert len(spy.loads) == 1
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("**/*_wan.safetensors")}


def test_only_what_is_missing_broken_or_of_another_size_is_encoded(folder, vae_path, spy, capsys):
    cache(vae_path)
    missing, broken, *others = all_clips()
    latents_path(missing).unlink()
    latents_path(broken).write_bytes(latents_path(broken).read_bytes()[:50])
    times = [latents_path(clip).stat().st_mtime_ns for clip in others]
    capsys.readouterr()
    assert cache(vae_path) == 0
    assert "2 encoded, 11 kept" in capsys.readouterr().err
    assert times == [latents_path(clip).stat().st_mtime_ns for clip in others]
    assert has_latents(missing) and has_latents(broken)
    # The image keeps its file's name in another bucket and is encoded again all the same.
    (folder / "data.toml").write_text(TOML + "resolution = [32, 32]")
    assert cache(vae_path) == 0
    assert "1 encoded, 12 kept" in capsys.readouterr().err
    assert all(map(has_latents, all_clips()))


def test_clips_of_a_size_share_a_call_up_to_the_batch_size(folder, vae_path, spy):
    cache(vae_path)
    # By size: c (48 wide) has 2 + 2 clips; a and b have 4 + 4, three to a call; the image's dataset takes one.
    assert spy.calls == [
        (2, 3, 1, 64, 48),
        (2, 3, 5, 64, 48),
        (3, 3, 1, 48, 64),
        (3, 3, 5, 48, 64),
        (1, 3, 1, 48, 64),
        (1, 3, 5, 48, 64),
        (1, 3, 1, *spy.calls[-1][3:]),
    ]


def test_batch_size_caps_the_dataset_s_and_never_raises_it(folder, vae_path, spy):
    cache(vae_path, "--batch_size", "2")
    assert {call[0] for call in spy.calls[:-1]} == {2}
    assert spy.calls[-1][0] == 1


@pytest.mark.parametrize("num_workers", ["0", "3"])
def test_decoding_ahead_changes_nothing(folder, vae_path, num_workers):
    cache(vae_path, "--num_workers", num_workers, "--vae_dtype", "fp32", "--batch_size", "1")
    vae = wan_train.load_vae(vae_path)
    for clip in all_clips():
        (images,) = load_clips([clip])
        assert torch.equal(read_latents(clip), vae.encode(to_pixels(torch.from_numpy(images)[None]))[0])


def test_vae_options_reach_the_vae_and_the_files(folder, vae_path, spy):
    tiling = ("--vae_tiling", "--vae_tile_size", "20", "--vae_tile_overlap", "4")
    cache(vae_path, "--vae_dtype", "fp16", "--vae_cache_cpu", *tiling)
    assert spy.cache_on_cpu is True and spy.tiling == Tiling(20, 4)
    assert spy.loads[0]["dtype"] == torch.float16
    assert spy.loads[0]["device"] == torch.device("cpu")
    for clip in all_clips():
        assert set(read_header(latents_path(clip)).dtypes.values()) == {torch.float16}


def test_short_videos_are_told_at_the_end(folder, vae_path, spy, capsys):
    draw_video(folder / "clips/short.mp4", 4)
    (folder / "clips/short.txt").write_text("short")
    (folder / "data.toml").write_text(TOML.replace("[1, 5]", "[5]"))
    assert cache(vae_path) == 0
    *_, warning, summary = capsys.readouterr().err.strip().splitlines()
    assert "1 of 4 videos give no clip" in warning and "short.mp4" in warning
    assert "1 files gave no clip" in summary


def test_latents_that_are_not_finite_stop_the_run_with_the_clip(folder, vae_path, spy, capsys):
    spy.value = float("nan")
    assert cache(vae_path) == 2
    assert "clips/c.mp4" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(folder.glob("**/*_wan.safetensors"))


def test_a_video_cut_off_later_is_named(folder, vae_path, spy, capsys):
    path = draw_video(folder / "clips/a.mp4", 60, size=(256, 192), options={"g": "10", "crf": "1"})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    assert cache(vae_path) == 2 and spy.loads
    assert "clips/a.mp4 " in capsys.readouterr().err.strip().splitlines()[-1]


def test_training_finds_what_was_cached(folder, vae_path, capsys):
    cache(vae_path)
    with pytest.raises(ValueError) as raised:
        open_cached(read_config("data.toml"), allow_missing_captions=False)
    assert "text caches" in str(raised.value) and "latent caches" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--dataset_config", "none.toml", "--vae", "vae.safetensors"], "none.toml"),
        (["--dataset_config", "data.toml"], "--vae"),
        (["--dataset_config", "data.toml", "--vae", "none.safetensors"], "none.safetensors"),
        (["--dataset_config", "data.toml", "--vae", "clips/a.txt"], "clips/a.txt"),
        (["--dataset_config", "data.toml", "--vae", "vae.safetensors", "--batch_size", "0"], "--batch_size"),
        (["--dataset_config", "data.toml", "--vae", "vae.safetensors", "--vae_dtpye", "fp16"], "--vae_dtype"),
        (["--dataset_config", "data.toml", "--vae", "vae.safetensors", "--vae_dtype", "bf61"], "bf61"),
        (["--vae", "vae.safetensors"], "--dataset_config"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, spy, capsys, arguments, part):
    assert run(LATENTS_TOOL, arguments) == 2
    error = capsys.readouterr().err
    assert part in error and error.startswith("error: ") and error.count("\n") == 1
    assert not spy.loads


def test_a_missing_caption_is_found_before_anything_is_encoded(folder, vae_path, spy, capsys):
    (folder / "clips/b.txt").unlink()
    assert cache(vae_path) == 2
    assert "b.mp4" in capsys.readouterr().err and not spy.loads
    assert cache(vae_path, "--allow_missing_captions") == 0


def test_the_script_answers_help_without_torch_and_bad_input_with_2(folder):
    script = ROOT / "wan_cache_latents.py"
    code = "import runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: assert 'torch' not in sys.modules"
    code = f"import sys; sys.argv[0] = {str(script)!r}; {code}"
    help_run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert help_run.returncode == 0 and "--vae_cache_cpu" in help_run.stdout, help_run.stderr
    bad = subprocess.run([sys.executable, script, "--dataset_config", "none.toml"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "") and "none.toml" in bad.stderr and "Traceback" not in bad.stderr
