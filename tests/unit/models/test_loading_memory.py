"""How much memory a DiT takes while it loads: no tensor may be there twice."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wan_train.models.dit import Dit, DitConfig

LOAD = """
import pathlib, sys, threading, torch
from wan_train.models.loading import load_dit

def resident():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

load_dit(torch.load(sys.argv[3]))  # what a first load allocates for good
before, peak, done = resident(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, resident())

watcher = threading.Thread(target=watch)
watcher.start()
model = load_dit(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
done.set()
watcher.join()
size = sum(p.nbytes for p in model.parameters())
print((max(peak, resident()) - before) / size, size)
"""


def state(layers: int, dim: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Dit(DitConfig(dim, 4 * dim, 8, layers)).state_dict().items()}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("suffix", "stored", "wanted"),
    [
        ("safetensors", "float32", "bfloat16"),
        ("safetensors", "bfloat16", "bfloat16"),
        ("safetensors", "bfloat16", "float32"),
        ("pth", "float32", "float32"),
    ],
)
def test_loading_holds_nothing_twice(tmp_path: Path, root: Path, suffix: str, stored: str, wanted: str) -> None:
    path, small = tmp_path / f"dit.{suffix}", tmp_path / "small.pt"
    tensors = state(16, 1024 if stored == "float32" else 1536, getattr(torch, stored))
    (save_file if suffix == "safetensors" else torch.save)(tensors, path)
    del tensors
    assert path.stat().st_size > 1e9
    torch.save(state(1, 64, torch.float32), small)
    command = [sys.executable, "-c", LOAD, str(path), wanted, str(small)]
    ratio, size = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert float(size) > 5e8
    assert float(ratio) <= 1.05
