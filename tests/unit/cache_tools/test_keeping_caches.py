"""What a caching run makes of the caches that are there: kept, adopted, made again, deleted, shared out."""

import contextlib
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

import dataset.reading.probes
import wan_train
from cache_tools.settings import LATENTS_TOOL
from dataset.batching.batches import open_cached
from dataset.caching.cache import save_text
from dataset.config import read_config
from dataset.sources import list_items
from tests.unit.dataset.drawing import make_clips, write_toml
from wan_train.cli import run
from wan_train.errors import InputError
from wan_train.file_names import HOST
from wan_train.storage import read_tensors, save_tensors

TOML = """
[general]
resolution = [64, 48]
[[datasets]]
video_directory = "clips"
cache_directory = "cache"
target_frames = [1, 5]
"""


@pytest.fixture(scope="module")
def cached_folder(tmp_path_factory, vae_path):
    folder = tmp_path_factory.mktemp("cached")
    with contextlib.chdir(folder):
        make_clips(folder / "clips", {"a": 5, "b": 6, "c": 9})
        write_toml(folder / "data.toml", TOML)
        shutil.copy(vae_path, folder / "vae.safetensors")
        assert cache() == 0
    return folder


@pytest.fixture
def folder(cached_folder, tmp_path, monkeypatch):
    """Three videos with their six latents, all up to date, as the working folder."""
    shutil.copytree(cached_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cache(*more):
    return run(LATENTS_TOOL, ["--dataset_config", "data.toml", "--vae", "vae.safetensors", "--device", "cpu", *more])


def summary_of(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def visible(folder):
    return sorted(path.name for path in (folder / "cache").iterdir() if not path.name.startswith("."))


def change(path):
    """Other bytes of the same length, at another time."""
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, ns=(5, 5))


def test_a_second_run_decodes_hashes_and_probes_nothing(folder, capsys, monkeypatch):
    assert cache() == 0  # reads the headers of the new files
    for name in (
        "dataset.caching.recipe.file_hash",
        "cache_tools.cache_latents.load_clips",
        "dataset.caching.staleness.read_header",
    ):
        monkeypatch.setattr(name, None)
    monkeypatch.setattr(wan_train, "load_vae", None, raising=False)
    monkeypatch.setattr(dataset.reading.probes, "probe", None)
    assert cache() == 0
    assert summary_of(capsys).endswith("latents: 0 encoded, 6 kept")


def test_each_kind_of_cache_is_told_counted_and_dealt_with(folder, capsys):
    change(folder / "clips/a.mp4")
    half = folder / "cache/b_00000-001_0064x0048_wan.safetensors"
    half.write_bytes(half.read_bytes()[:70])
    foreign = folder / "cache/c_00000-001_0064x0048_wan.safetensors"
    save_tensors(foreign, dict(read_tensors(foreign)), {"architecture": "wan", "width": "64", "height": "48"})
    before = foreign.read_bytes()
    shutil.copy(foreign, folder / "cache/gone_00000-001_0064x0048_wan.safetensors")
    assert cache() == 0
    error = capsys.readouterr().err
    assert "a_00000-001_0064x0048_wan.safetensors: source changed" in error
    assert "b_00000-001_0064x0048_wan.safetensors: truncated" in error
    assert "1 caches without a recipe match and are adopted: c_00000-001" in error
    assert "1 caches match nothing in the dataset (--prune deletes them): gone_00000-001" in error
    last = error.strip().splitlines()[-1]
    for part in ("3 encoded, 3 kept", "2 stale", "1 truncated", "1 adopted", "1 orphaned"):
        assert part in last
    assert foreign.read_bytes() == before
    assert cache() == 0
    assert "0 encoded, 6 kept, 1 adopted, 1 orphaned" in summary_of(capsys)


def test_another_vae_makes_everything_again_and_a_copy_of_it_nothing(folder, capsys):
    shutil.copy(folder / "vae.safetensors", folder / "copy.safetensors")
    os.utime(folder / "copy.safetensors", ns=(5, 5))
    os.replace(folder / "copy.safetensors", folder / "vae.safetensors")
    assert cache() == 0
    assert "0 encoded, 6 kept" in summary_of(capsys)
    other = {name: tensor * 1.01 for name, tensor in read_tensors(folder / "vae.safetensors")}
    save_tensors(folder / "vae.safetensors", other)
    assert cache() == 0
    error = capsys.readouterr().err
    assert "different VAE (vae.safetensors)" in error and "6 encoded, 0 kept, 6 stale" in error


@pytest.mark.parametrize("options", [(), ("--keep_cache",), ("--skip_existing", "--keep_cache")])
def test_nothing_is_deleted_unless_asked(folder, options):
    write_toml(folder / "data.toml", TOML.replace("[1, 5]", "[1]"))
    before = visible(folder)
    assert cache(*options) == 0
    assert visible(folder) == before and len(before) == 7 and before[-1] == "manifest.db"


def test_prune_deletes_orphans_and_stale_caches_and_says_so(folder, capsys):
    write_toml(folder / "data.toml", TOML.replace("[1, 5]", "[1]"))
    (folder / "cache/notes.safetensors").write_text("not a cache")
    change(folder / "clips/a.mp4")
    assert cache("--prune") == 0
    error = capsys.readouterr().err
    assert "deleted 3 orphaned caches: a_00000-005" in error and "deleted 1 stale caches: a_00000-001" in error
    assert visible(folder) == [
        *(f"{name}_00000-001_0064x0048_wan.safetensors" for name in "abc"),
        "manifest.db",
        "notes.safetensors",
    ]


def test_prune_and_keep_contradict_each_other(folder, capsys):
    assert cache("--prune", "--keep_cache") == 2
    assert "--keep_cache" in capsys.readouterr().err


def test_what_dead_runs_left_goes_at_the_next_start(folder, capsys):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    living = folder / f"cache/.a_wan.{HOST}~{os.getpid()}~abcdefgh"
    elsewhere = folder / f"cache/.a_wan.far-{HOST}~{gone.pid}~abcdefgh"
    old = folder / f"cache/.b_wan.far-{HOST}~{gone.pid}~abcdefgh"
    dead = folder / f"cache/.a_wan.{HOST}~{gone.pid}~abcdefgh"
    other, probe = folder / "cache/.hidden", folder / "cache/.probeabcd_123"
    for path in (living, elsewhere, old, dead):
        path.mkdir()
        (path / "new.safetensors").write_bytes(b"half")
        (path / ".tmp123456").write_bytes(b"what a writer wrote before that")
    for path in (other, probe):
        path.write_bytes(b"half")
    for path in (old, other, probe):
        os.utime(path, (0, time.time() - 2 * 24 * 60 * 60))
    assert cache() == 0
    assert "deleted 3 unfinished files of earlier runs" in capsys.readouterr().err
    assert living.exists() and elsewhere.exists() and other.exists()
    assert not old.exists() and not dead.exists() and not probe.exists()


def test_training_refuses_what_is_stale_with_the_command_and_adopts_what_is_foreign(folder):
    (config,) = read_config("data.toml")
    for item in list_items(config, allow_missing_captions=False):
        save_text(item, {item.caption: torch.zeros(2, 8)})
    foreign = folder / "cache/c_00000-001_0064x0048_wan.safetensors"
    save_tensors(foreign, dict(read_tensors(foreign)))
    assert open_cached([config], allow_missing_captions=False).num_items == 6
    change(folder / "clips/a.mp4")
    with pytest.raises(InputError) as raised:
        open_cached([config], allow_missing_captions=False)
    assert "2 of 6 latent caches" in str(raised.value) and "source changed" in str(raised.value)
    assert "python wan_cache_latents.py --dataset_config data.toml --vae" in str(raised.value)


def test_a_broken_video_is_an_error_or_skipped_by_name(folder, capsys):
    data = (folder / "clips/a.mp4").read_bytes()
    middle = data.index(b"mdat") + 600
    (folder / "clips/d.mp4").write_bytes(data[:middle] + os.urandom(len(data) - middle))
    (folder / "clips/e.mp4").write_bytes(b"not a video")
    for name in "de":
        (folder / f"clips/{name}.txt").write_text("broken")
    assert cache() == 2
    assert "clips/" in summary_of(capsys)
    assert cache("--skip_broken") == 0
    first = capsys.readouterr().err
    assert cache("--skip_broken") == 0
    assert "2 files gave no clip (broken)" in summary_of(capsys) and "e.mp4" in first
    (config,) = read_config("data.toml")
    for item in list_items(config, allow_missing_captions=False):
        save_text(item, {item.caption: torch.zeros(2, 8)})
    assert open_cached([config], allow_missing_captions=False, skip_broken=True).num_items == 6


def test_processes_share_the_work_and_no_file_is_written_twice(folder, monkeypatch, capsys):
    for path in (folder / "cache").glob("*.safetensors"):
        path.unlink()
    written = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert cache() == 0
        line = f"latents (process {rank + 1} of 2): {(4, 2)[rank]} encoded, 0 kept"
        assert summary_of(capsys).endswith(line)
        written.append({path: path.stat().st_ino for path in (folder / "cache").glob("*.safetensors")})
    assert len(written[0]) == 4 and len(written[1]) == 6
    assert all(written[1][path] == inode for path, inode in written[0].items())


def test_two_runs_at_once_do_no_harm(folder, root):
    expected = {path.name: dict(read_tensors(path)) for path in (folder / "cache").glob("*.safetensors")}
    shutil.rmtree(folder / "cache")
    command = [sys.executable, root / "wan_cache_latents.py", "--dataset_config", "data.toml", "--vae"]
    command += ["vae.safetensors", "--device", "cpu"]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen(command, env=quiet, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for one in runs:
        _, error = one.communicate(timeout=120)
        assert one.returncode == 0, error
    assert visible(folder) == [*sorted(expected), "manifest.db"]
    for name, tensors in expected.items():
        for key, tensor in read_tensors(folder / "cache" / name):
            assert torch.equal(tensor, tensors[key])
