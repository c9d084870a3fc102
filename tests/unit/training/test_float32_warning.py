"""What is told of the precision that weights are computed in, before a model is loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wan_train.training.preflight import float32_warning

CUDA, MPS, CPU = (torch.device(name) for name in ("cuda", "mps", "cpu"))
HALF, FLOAT, FULL = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("device", "stored", "computing", "advice"),
    [
        (CUDA, HALF, FULL, "bf16"),
        (CUDA, FLOAT, FULL, "fp16"),
        (CUDA, torch.float8_e4m3fn, FULL, "bf16"),
        (MPS, HALF, FULL, "bf16"),
        (CUDA, HALF, HALF, None),
        (CUDA, FULL, FULL, None),
        (CPU, HALF, FULL, None),
    ],
)
def test_float32_that_nobody_asked_for_is_told_of(
    device: torch.device, stored: torch.dtype, computing: torch.dtype, advice: str | None, tmp_path: Path
) -> None:
    path = str(tmp_path / "dit.safetensors")
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(2, 2).to(stored), "head.modulation": torch.zeros(2)}, path)
    told = float32_warning(device, path, computing, "--dit_high_noise")
    if advice is None:
        assert told is None
    else:
        assert told is not None and told.startswith(f"--dit_high_noise {path} is stored in ")
        assert f"use --mixed_precision {advice}, or" in told
