"""Caching that is killed at any moment continues where it stopped, and leaves no half file to be read."""

import random
import time
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.tiny.make import VAE
from tests.unit.dataset.drawing import make_clips
from wan_train.storage import read_tensors

TOML = """
[[datasets]]
video_directory = "{clips}"
cache_directory = "{cache}"
resolution = [96, 64]
target_frames = [1, 5, 9]
frame_extraction = "uniform"
frame_sample = 4
"""
SECONDS = 300


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("killed") / "clips", {name: 16 for name in "abcdef"})


class Caching:
    """The command over one cache folder, run in a process of its own."""

    def __init__(self, folder: Path, clips: Path, vae: Path) -> None:
        self.cache = folder / "cache"
        folder.mkdir()
        data = folder / "data.toml"
        data.write_text(TOML.format(clips=clips, cache=self.cache))
        self.command = ["wan_cache_latents.py", "--dataset_config", str(data), "--vae", str(vae)]

    def finish(self) -> str:
        return processes.run(*self.command).stderr

    def files(self) -> list[Path]:
        """The visible ones; a run that dies leaves a hidden one."""
        return sorted(path for path in self.cache.glob("*.safetensors") if not path.name.startswith("."))

    def kill(self, num_files: int, wait: float) -> None:
        """Start, and kill as soon as so many files are there and `wait` seconds have gone by."""
        running, end = processes.start(*self.command), time.monotonic() + SECONDS
        while running.poll() is None and len(self.files()) < num_files and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(wait)
        running.kill()


def read_all(paths: list[Path]) -> dict[str, torch.Tensor]:
    """Every tensor; a file that is not whole is an error."""
    return {f"{path.name} {key}": tensor for path in paths for key, tensor in read_tensors(path)}


def check_kills(caching: Caching, unbroken: dict[str, torch.Tensor], num_kills: int) -> None:
    total, moments, num_written = len(unbroken), random.Random(num_kills), 0
    for kill in range(num_kills):
        done = caching.files()
        if len(done) > total // 2:
            for path in moments.sample(done, len(done) - 2):
                path.unlink()
            done = caching.files()
        # The command writes some files first, so that it dies at work; at times it dies on its way there.
        caching.kill(len(done) + moments.randrange(total // 4), moments.uniform(0, 0.05))
        found = read_all(caching.files())
        assert set(done) <= set(caching.files()), f"kill {kill} lost files"
        assert all(torch.equal(tensor, unbroken[name]) for name, tensor in found.items())
        num_written += len(found) - len(done)
    assert num_written > num_kills
    error = caching.finish()
    found = read_all(caching.files())
    assert found.keys() == unbroken.keys(), error
    assert all(torch.equal(tensor, unbroken[name]) for name, tensor in found.items())
    left = [path.name for path in caching.cache.iterdir() if path not in caching.files()]
    assert sorted(left) == [".manifest.lock", "manifest.db"]
    assert "latents: 0 encoded" in caching.finish()


@pytest.fixture(scope="module")
def unbroken(clips: Path, tiny: Path) -> dict[str, torch.Tensor]:
    caching = Caching(clips.parent / "unbroken", clips, tiny / VAE)
    caching.finish()
    return read_all(caching.files())


def test_five_kills(tmp_path: Path, clips: Path, tiny: Path, unbroken: dict[str, torch.Tensor]) -> None:
    assert len(unbroken) == 72
    check_kills(Caching(tmp_path / "five", clips, tiny / VAE), unbroken, 5)


@pytest.mark.slow
def test_fifty_kills(tmp_path: Path, clips: Path, tiny: Path, unbroken: dict[str, torch.Tensor]) -> None:
    check_kills(Caching(tmp_path / "fifty", clips, tiny / VAE), unbroken, 50)
