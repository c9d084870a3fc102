"""Measure how long it takes to detect that nothing changed: a second caching run, and planning many known files.

    python benchmarks/known.py [--items 1000] [--planned 10000]

Prints JSON: seconds beyond imports of `wan_cache_latents.py` over `items` videos whose latents are up to date, and of
planning `planned` videos with headers in the manifest; each the median of five runs, and the first run.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from cache_tools.settings import LATENTS_TOOL
from dataset.caching.cache import save_latents
from dataset.caching.manifest import Manifest
from dataset.caching.recipe import Recipe, take_fingerprint
from dataset.config import DatasetConfig, read_config
from dataset.sources import ClipPlan, list_items, plan_clips
from tests.tiny.make import VAE, draw_clips, make_models
from wan_train.cli import run

REPEATS = 5
TOML = """
[[datasets]]
video_directory = "{clips}"
cache_directory = "{cache}"
resolution = [96, 64]
target_frames = [17]
"""


def make_data(folder: Path, num_items: int) -> Path:
    """Make `num_items` copies of a drawn video with captions, and a TOML for them."""
    draw_clips(folder / "drawn")
    source, clips = next((folder / "drawn").glob("*.mp4")), folder / "clips"
    clips.mkdir()
    for number in range(num_items):
        shutil.copy(source, clips / f"{number:06d}.mp4")
        (clips / f"{number:06d}.txt").write_text(f"clip {number}")
    data = folder / "data.toml"
    data.write_text(TOML.format(clips=clips, cache=folder / "cache"))
    return data


def plan_all(config: DatasetConfig) -> ClipPlan:
    return plan_clips(config, list_items(config, allow_missing_captions=False))


def time_runs(work: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of the first run, and the median of the following ones."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return {"first": round(seconds[0], 3), "again": round(statistics.median(seconds[1:]), 3)}


def time_caching(folder: Path, num_items: int) -> dict[str, float]:
    """Time a caching run over latents that all exist; they are written here in the script's format."""
    data = make_data(folder, num_items)
    make_models(folder / "models")
    vae = folder / "models" / VAE
    (config,) = read_config(data)
    with Manifest(config.cache_directory) as manifest:
        model = take_fingerprint(vae, manifest)
        for clip in plan_all(config).clips:
            source = take_fingerprint(clip.item.path, manifest)
            recipe = Recipe(model, "bfloat16", source, clip.start, clip.frames, clip.size)
            save_latents(clip, torch.zeros(clip.latent_shape), torch.bfloat16, recipe)
    command = ["--dataset_config", str(data), "--vae", str(vae), "--device", "cpu"]
    return time_runs(lambda: run(LATENTS_TOOL, command))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--planned", type=int, default=10000)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        cached = time_caching(Path(one), wanted.items)
        (config,) = read_config(make_data(Path(two), wanted.planned))
        planned = time_runs(lambda: plan_all(config))
    print(json.dumps({"cached": {"items": wanted.items, **cached}, "planned": {"files": wanted.planned, **planned}}))


if __name__ == "__main__":
    main()
