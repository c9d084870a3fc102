"""A resumed run against one without interruption, on the device."""

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from benchmarks.first_look.models import TINY, Mode, build
from benchmarks.first_look.modes import CPU, FULL, RECOMPUTED
from benchmarks.first_look.rows import Measured, Row, Values
from benchmarks.first_look.stepping import Stepper, make_stepper
from wan_train.storage import read_parts, read_tensors, save_parts, save_tensors

BEFORE, AFTER = 2, 1  # steps before and after the interruption
MODES = {
    "lora": Mode(activations=RECOMPUTED),
    "full": Mode(network=FULL, fused=True, optimizer="AdamW8bitSR", activations=RECOMPUTED),
}


def resume_rows(device: torch.device) -> list[Row]:
    """Return the rows of a resumed LoRA and a resumed full fine-tuning."""
    return [Row(f"resume/{name}", 4.0, partial(check, mode, device)) for name, mode in MODES.items()]


def check(mode: Mode, device: torch.device, earlier: Mapping[str, Values]) -> Measured:
    """Save after some steps, restore into another model, and compare the next loss and weights bit for bit.

    Backward kernels may add in another order from run to run; `same_weights` is recorded and not judged.
    """
    whole, resumed = make(mode, device), make(mode, device)
    for number in range(BEFORE):
        whole.step(TINY, number, device)
    with tempfile.TemporaryDirectory() as folder:
        save(whole, Path(folder))
        load(resumed, Path(folder))
    restored = same_weights(whole, resumed)
    losses = [[float(run.step(TINY, BEFORE + i, device)) for i in range(AFTER)] for run in (whole, resumed)]
    values: Values = {"restored": restored, "same_loss": losses[0] == losses[1]}
    values["same_weights"] = same_weights(whole, resumed)
    wrong = [name for name in ("restored", "same_loss") if not values[name]]
    return Measured(values, f"not bit for bit: {', '.join(wrong)}" if wrong else "")


def make(mode: Mode, device: torch.device) -> Stepper:
    """Return a tiny model at step 0."""
    return make_stepper(mode, build(mode, TINY, layers=TINY.layers, device=device, drawn_on=CPU), device)


def save(stepper: Stepper, folder: Path) -> None:
    """Write weights and optimizer state, in the formats of a training state."""
    weights = {name: parameter.detach() for name, parameter in stepper.built.adapter.named_parameters()}
    save_tensors(folder / "adapter.safetensors", weights)
    save_parts(folder / "run.pt", {"optimizer": stepper.optimizer.state_dict()})


@torch.no_grad()
def load(stepper: Stepper, folder: Path) -> None:
    """Restore what `save` wrote."""
    saved = dict(read_tensors(folder / "adapter.safetensors"))
    for name, parameter in stepper.built.adapter.named_parameters():
        parameter.copy_(saved[name])
    stepper.optimizer.load_state_dict(read_parts(folder / "run.pt")["optimizer"])


def same_weights(one: Stepper, other: Stepper) -> bool:
    """Return whether all trained weights are equal, bit for bit."""
    pairs = zip(one.built.adapter.named_parameters(), other.built.adapter.named_parameters(), strict=True)
    return all(torch.equal(a, b) for (_, a), (_, b) in pairs)
