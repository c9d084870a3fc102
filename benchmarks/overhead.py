"""Measure the time of a training step outside the model: everything except its passes, clipping and the optimizer step.

A tiny model with latents of a 480x832 image is trained by the trainer's own loop. From the time of each whole step,
that of the model's forward and backward pass, of clipping and of the optimizer is subtracted.

    python benchmarks/overhead.py [--steps 300]
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tests.tiny.make import DIT, T5, VAE, make
from wan_train.cli import run
from wan_train.training import loop, step
from wan_train.training.settings import TOOL


class Clock:
    """Accumulated seconds inside wrapped functions since the last read."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, wrapped to count its time."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def prepare(folder: Path) -> None:
    """Cache the first frames of the tiny dataset as images of 480x832."""
    from cache_tools.settings import LATENTS_TOOL, TEXT_TOOL

    make(folder)
    path = folder / "data.toml"
    text = path.read_text().replace("resolution = [96, 64]", "resolution = [832, 480]")
    path.write_text(text.replace("target_frames = [17]", "target_frames = [1]"))
    data = ["--dataset_config", str(path)]
    assert run(LATENTS_TOOL, [*data, "--vae", str(folder / VAE)]) == 0
    assert run(TEXT_TOOL, [*data, "--t5", str(folder / T5)]) == 0


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    count = parser.parse_args().steps
    model, whole, outside = Clock(), Clock(), []
    for name in ("measure", "clip", "update"):
        setattr(step, name, model.around(getattr(step, name)))
    torch.Tensor.backward = model.around(torch.Tensor.backward)  # type: ignore[method-assign]
    report = loop.report

    def take(*args: Any, **kwargs: Any) -> Any:
        model.seconds = whole.seconds = 0.0
        return whole.around(step.take_step)(*args, **kwargs)

    def told(*args: Any) -> None:
        whole.around(report)(*args)
        outside.append(whole.seconds - model.seconds)

    loop.take_step, loop.report = take, told
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        words = f"""--task t2v-1.3B --dit {folder / DIT} --dataset_config {folder / "data.toml"} --mixed_precision no
            --network_module networks.lora_wan --network_dim 16 --max_train_steps {count} --seed 1 --trust_cache
            --max_data_loader_n_workers 0 --output_dir {folder / "out"} --output_name name"""
        assert run(TOOL, words.split()) == 0
    median = statistics.median(outside[10:])
    print(
        json.dumps(
            {
                "machine": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "outside_ms": round(1000 * median, 3),
                "share_of_0.1_s": round(median / 0.1, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
