"""Measure how fast caches are read and written, and how long a step waits for its batch.

Items of 5 MB: latents 16x21x60x104 (81 frames of 832x480) and 100 tokens of text, in bfloat16.

    python benchmarks/io.py [--items 200] [--folder DIR]
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dataset.batching.ahead import read_ahead
from dataset.batching.batches import CachedDataset, collate
from dataset.batching.epochs import EpochBatches
from dataset.caching.cache import latents_path, save_latents, save_text
from dataset.config import DatasetConfig
from dataset.items import Clip, Item
from dataset.sources import ClipPlan
from wan_train.training.build import make_loader
from wan_train.training.settings import LoopSettings

SIZE, FRAMES, TOKENS = (832, 480), 81, 100
STEP = 0.1  # seconds
ROUNDS = 5


def make_plan(folder: Path, count: int) -> ClipPlan:
    """Return the plan of `count` clips of one dataset, none of them cached yet."""
    config = DatasetConfig(folder / "data.toml", 1, is_video=True, directory=folder, cache_directory=folder / "cache")
    items = [Item(config, folder / f"clip{number:04d}.mp4", ("a caption",)) for number in range(count)]
    clips = [Clip(item, 0, tuple(range(FRAMES)), SIZE, SIZE) for item in items]
    return ClipPlan(config, tuple(items), tuple(clips), ())


def measure_writes(plan: ClipPlan) -> dict[str, float]:
    """Measure writing latents as the cache does, against writing, flushing and renaming the same bytes, in turns."""
    latents = torch.randn(plan.clips[0].latent_shape)
    embeddings = {"a caption": torch.randn(TOKENS, 4096)}
    content = os.urandom(2 * latents.numel())
    ours, raw = [], []
    for number, clip in enumerate(plan.clips):
        save_text(clip.item, embeddings)

        def write(clip: Clip = clip) -> None:
            save_latents(clip, latents, torch.bfloat16)

        def write_raw(clip: Clip = clip) -> None:
            flush_bytes(latents_path(clip).with_suffix(".raw"), content)

        # Files are kept until the end: the next write would reuse their memory, which is faster than new memory.
        pairs = [(ours, write), (raw, write_raw)]
        for times, call in pairs if number % 2 else reversed(pairs):
            times.append(timed(call))
    return {
        "ours_ms": 1000 * statistics.median(ours),
        "raw_ms": 1000 * statistics.median(raw),
        "share_of_raw": statistics.median(raw) / statistics.median(ours),
    }


def flush_bytes(path: Path, content: bytes) -> None:
    """Write a file crash-safely with the least work: write beside, flush, rename, flush the folder."""
    beside = path.with_suffix(".part")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def measure_reads(dataset: CachedDataset) -> dict[str, float]:
    """Measure reading and collating batches of one item in one thread, from files in the page cache."""

    def read() -> None:
        for number in range(len(dataset)):
            collate([dataset[number]])

    read()
    rates = [len(dataset) / timed(read) for _ in range(ROUNDS)]
    return {"batches_per_s": statistics.median(rates), "slowest": min(rates), "fastest": max(rates)}


def measure_waiting(dataset: CachedDataset, num_steps: int) -> dict[str, float]:
    """Measure how long a step of 0.1 s waits for its batch with the trainer's loader, without the start of an epoch."""
    batches = EpochBatches(dataset, seed=0)
    loader = read_ahead(make_loader(dataset, batches, LoopSettings(), torch.device("cpu")))
    began = time.perf_counter()
    next(loader)
    first = time.perf_counter() - began
    waits = []
    for _ in range(num_steps):
        time.sleep(STEP)
        waits.append(timed(lambda: next(loader)))
    return {"share_of_step": statistics.mean(waits) / STEP, "worst_ms": 1000 * max(waits), "first_batch_s": first}


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    """Print one line of JSON for each benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--folder", help="temporary folder for the caches, on the disk to measure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"machine": platform.processor() or platform.machine(), "torch": torch.__version__}))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        plan = make_plan(Path(folder), options.items)
        print(json.dumps({"kind": "writes"} | measure_writes(plan)), flush=True)
        dataset = CachedDataset([plan])
        print(json.dumps({"kind": "reads"} | measure_reads(dataset)), flush=True)
        print(json.dumps({"kind": "waiting"} | measure_waiting(dataset, min(options.items - 1, 100))), flush=True)


if __name__ == "__main__":
    main()
