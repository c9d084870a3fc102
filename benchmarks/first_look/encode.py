"""Seconds of the VAE's encoder for a clip of 832x480x81, with random weights of the published shapes."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from benchmarks.first_look.rows import Measured, Row, Values
from benchmarks.first_look.timing import seconds_of
from tests.parity.golden import load_case, state_dict
from wan_train.models.vae.vae import load_vae

SHAPES = Path(__file__).resolve().parents[2] / "tests" / "data" / "checkpoints" / "wan2.1-vae.json"
CLIP, SMALL_CLIP = (81, 480, 832), (5, 32, 40)  # frames, height, width


def encode_rows(device: torch.device, *, small: bool) -> list[Row]:
    """Return the row of each data type."""
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    call = partial(encode, device, small=small)
    return [Row(f"vae/encode {name}", 25.0, partial(call, dtype)) for name, dtype in dtypes.items()]


def encode(device: torch.device, dtype: torch.dtype, earlier: Mapping[str, Values], *, small: bool) -> Measured:
    """Return the seconds of encoding one clip after one to warm up, and the peak of memory."""
    frames, height, width = SMALL_CLIP if small else CLIP
    weights = load_case("wan21_vae").state_dict() if small else state_dict(json.loads(SHAPES.read_text())["shapes"])
    vae = load_vae(weights, device=device, dtype=dtype)
    pixels = torch.rand(1, 3, frames, height, width, device=device).mul_(2).sub_(1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.no_grad():
        values: Values = {"seconds": seconds_of(lambda: vae.encode(pixels), device)}
    if device.type == "cuda":
        values["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return Measured(values)
