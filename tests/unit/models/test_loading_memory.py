"""How much memory a DiT takes while it loads: no tensor may be there twice."""

import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import wan_train.assemble
from wan_train.assemble import ModelSettings, WeightedLora, assemble_dit
from wan_train.models.dit.dit import Dit, DitConfig
from wan_train.models.settings import DitSettings
from wan_train.placement.settings import StreamSettings
from wan_train.quantization.settings import WeightSettings

LOAD = """
import sys, torch
from tests.unit.models.peak import tell_peak
from wan_train.models.loading import load_dit

path, dtype, small = sys.argv[1:]
tell_peak(lambda: load_dit(torch.load(small)), lambda: load_dit(path, dtype=getattr(torch, dtype)))
"""


def state(layers: int, dim: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Dit(DitConfig(dim, 4 * dim, 8, layers)).state_dict().items()}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "weights",
    [
        WeightSettings(fp8_base=True),
        WeightSettings(fp8_base=True, fp8_scaled=True),
        WeightSettings(int8_base=True, int8_ffn2=True),
    ],
)
@pytest.mark.parametrize("swap", [0, 2])
def test_of_what_is_quantised_one_matrix_at_a_time_is_there(
    weights: WeightSettings, swap: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the file's own numbers, that is; a LoRA is merged on the way."""
    path, lora = str(tmp_path / "dit.safetensors"), str(tmp_path / "lora.safetensors")
    save_file(state(3, 128, torch.bfloat16), path)
    pair = {"down": torch.randn(2, 128), "up": torch.randn(128, 2)}
    save_file({f"lora_unet_blocks_1_self_attn_q.lora_{key}.weight": part for key, part in pair.items()}, lora)
    alive: dict[str, weakref.ref[Tensor]] = {}
    most = 0

    def watched(source: str) -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for name, tensor in wan_train.storage.read_tensors(source):
            if name.startswith("blocks.") and tensor.ndim == 2:
                tensor = tensor.clone()
                alive[name] = weakref.ref(tensor)
            most = max(most, sum(found() is not None for found in alive.values()))
            yield name, tensor

    monkeypatch.setattr(wan_train.assemble, "read_tensors", watched)
    settings = ModelSettings(DitSettings(dit=path), weights, StreamSettings(blocks_to_swap=swap))
    model = assemble_dit(settings, device=torch.device("cpu"), loras=[WeightedLora(lora)])
    assert len(alive) == 3 * 10 and most <= 2
    assert all(p.dtype.itemsize == 1 for n, p in model.named_parameters() if n in alive)


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
