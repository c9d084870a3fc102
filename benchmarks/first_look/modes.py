"""Two training steps of each mode, on the device against the CPU, with tiny models."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.first_look.exact import exact_float32
from benchmarks.first_look.models import TINY, Mode, build
from benchmarks.first_look.rows import Measured, NotHere, Row, Values, beyond
from benchmarks.first_look.stepping import make_stepper, recording_gradients
from networks.settings import NetworkSettings
from tests.parity.golden import relative_error
from wan_train.errors import InputError
from wan_train.placement.settings import CompileSettings, RecomputeSettings
from wan_train.quantization.schemes import check_fp8_product
from wan_train.quantization.settings import FastWeightSettings, WeightSettings

CPU = torch.device("cpu")
NUM_STEPS = 2
RECOMPUTED = RecomputeSettings(recompute="full")
FULL = NetworkSettings(network_module="networks.full", full_bf16=True)
# Relative errors. Computing in bfloat16 on a CPU gives at most 1.7e-5 and 0.0058 in these modes.
LIMITS = {torch.bfloat16: {"losses": 1e-3, "gradients": 0.02}, torch.float32: {"losses": 1e-5, "gradients": 1e-4}}

MODES = {
    "lora float32": Mode(stored=torch.float32),
    "lora": Mode(),
    "gradient_checkpointing": Mode(activations=RECOMPUTED),
    "keep_attention": Mode(activations=RecomputeSettings(recompute="keep_attention")),
    "streamed": Mode(streamed=True, activations=RECOMPUTED),
    "activation offload": Mode(activations=replace(RECOMPUTED, gradient_checkpointing_cpu_offload=True)),
    "fp8": Mode(weights=WeightSettings(fp8_base=True)),
    "scaled fp8": Mode(weights=WeightSettings(fp8_base=True, fp8_scaled=True)),
    "fp8 products": Mode(weights=FastWeightSettings(fp8_base=True, fp8_scaled=True, fp8_fast=True)),
    "int8": Mode(weights=WeightSettings(int8_base=True)),
    "full, fused": Mode(network=FULL, fused=True),
    "full, fused, 8-bit states": Mode(network=FULL, fused=True, optimizer="AdamW8bitSR"),
    "full, streamed, states offloaded": Mode(
        network=FULL, fused=True, optimizer="AdamW8bitSR", offload=True, streamed=True, activations=RECOMPUTED
    ),
    "bitsandbytes AdamW8bit": Mode(optimizer="AdamW8bit"),
    "compile": Mode(activations=RECOMPUTED, compile=CompileSettings(compile=True)),
}
# Modes whose first loss is that of "lora" to the bit on one device.
EXACT = ("gradient_checkpointing", "keep_attention", "streamed", "activation offload")


@dataclass(frozen=True)
class Trace:
    """The losses of the steps, and the first gradient of each trained parameter, on the CPU."""

    losses: Tensor
    gradients: dict[str, Tensor]

    def all_gradients(self) -> Tensor:
        """Return all gradients as one vector."""
        return torch.cat([self.gradients[name].flatten() for name in sorted(self.gradients)])


def mode_rows(device: torch.device, *, small: bool) -> list[Row]:
    """Return one row for each mode; at tiny sizes what is compiled runs with torch's eager backend."""
    modes = dict(MODES)
    if small:
        eager = CompileSettings(compile=True, compile_backend="eager")
        modes["compile"] = replace(modes["compile"], compile=eager)
    return [
        Row(f"mode/{name}", 45.0 if mode.compile.compile else 4.0, partial(check, name, mode, device))
        for name, mode in modes.items()
    ]


def check(name: str, mode: Mode, device: torch.device, earlier: Mapping[str, Values]) -> Measured:
    """Compare a mode's steps on the device with those on the CPU, and with the plain mode's on the device."""
    require(mode, device)
    ours = trace(mode, device)
    theirs = trace(replace(mode, compile=CompileSettings(), optimizer=_on_cpu(mode.optimizer)), CPU)
    errors = compare(ours, theirs)
    wrong = beyond(errors, LIMITS[mode.stored])
    values: Values = {f"{part}_error": error for part, error in errors.items()}
    if name in EXACT:
        values["loss_as_plain"] = bool(ours.losses[0] == plain(device).losses[0])
        if not values["loss_as_plain"]:
            wrong = wrong or "the first loss is not that of a plain LoRA"
    return Measured(values, wrong)


def require(mode: Mode, device: torch.device) -> None:
    """Raise NotHere for a mode that this machine cannot run."""
    if mode.optimizer == "AdamW8bit" and (find_spec("bitsandbytes") is None or device.type != "cuda"):
        raise NotHere("needs a GPU and the package bitsandbytes")
    if isinstance(mode.weights, FastWeightSettings):
        try:
            check_fp8_product(device)
            check_fp8_product(CPU)
        except InputError as problem:
            raise NotHere(str(problem)) from None


def _on_cpu(optimizer: str) -> str:
    return "AdamW" if optimizer == "AdamW8bit" else optimizer


@cache
def plain(device: torch.device) -> Trace:
    """Return the trace of the plain LoRA mode."""
    return trace(MODES["lora"], device)


def trace(mode: Mode, device: torch.device) -> Trace:
    """Train a tiny model for two steps."""
    built = build(mode, TINY, layers=TINY.layers, device=device, drawn_on=CPU)
    gradients = recording_gradients(dict(built.adapter.named_parameters()))
    stepper = make_stepper(mode, built, device)
    with exact_float32():
        losses = [stepper.step(TINY, number, device).float().cpu() for number in range(NUM_STEPS)]
    return Trace(torch.stack(losses), gradients)


def compare(ours: Trace, theirs: Trace) -> dict[str, float]:
    """Return the largest relative error of a loss, and the relative error of all gradients together."""
    assert ours.gradients.keys() == theirs.gradients.keys(), "gradients of other parameters"
    losses = ((ours.losses - theirs.losses).abs() / theirs.losses.abs()).max()
    return {"losses": float(losses), "gradients": relative_error(ours.all_gradients(), theirs.all_gradients())}
