"""Stochastic rounding of bfloat16 weights: each is stepped in float32 and rounded back stochastically.

Rounding to nearest loses any update smaller than half a unit in the last place. Stochastic rounding keeps it in
expectation (Gupta et al. 2015, section 3). Only one weight at a time is in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wan_train.errors import InputError
from wan_train.flow.keyed import generator_of
from wan_train.training.optimizing.one_by_one import StepContext

# By package: optimizers that treat weights independently and support float32. bitsandbytes is untested.
_IN_FLOAT32 = {
    "torch": ("AdamW", "Adam", "SGD", "Adafactor"),
    "transformers": ("Adafactor",),
    "came_pytorch": ("CAME",),
    "wan_train": ("AdamW8bitSR",),
}


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round x, float32, to bfloat16 stochastically: up or down, with a probability by the distance to each neighbour.

    An integer drawn from [0, 2^16) is added to the bits that bfloat16 lacks, which are then cut off. NaN and Inf are
    kept.
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    cut = ((x.contiguous().view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), cut, x).to(torch.bfloat16)


def check_rounding(optimizer_class: Any, name: str) -> None:
    """Raise InputError for an optimizer class, called `name`, that does not support stochastic rounding."""
    if optimizer_class.__name__ not in _IN_FLOAT32.get(optimizer_class.__module__.partition(".")[0], ()):
        known = ", ".join(dict.fromkeys(name for names in _IN_FLOAT32.values() for name in names))
        raise InputError(
            f"--full_bf16 needs stochastic rounding, which --optimizer_type {name} does not support: use one of {known}"
        )


def rounded(seed: int) -> StepContext:
    """Return a step context that steps a bfloat16 weight in float32 and rounds it back stochastically; draws are keyed
    by `seed`."""

    @contextmanager
    def turn(optimizer: Any, parameter: nn.Parameter, key: str) -> Iterator[nn.Parameter]:
        if parameter.dtype != torch.bfloat16:
            yield parameter
            return
        # Not `parameter.data` in float32: data-parallel training would lose track of the parameter's gradients.
        fine = nn.Parameter(parameter.detach().float())
        assert parameter.grad is not None
        fine.grad = parameter.grad.float()
        optimizer.state[fine] = optimizer.state.pop(parameter, {})
        yield fine
        optimizer.state[parameter] = optimizer.state.pop(fine)
        generator = generator_of(f"{seed}/{key}/rounding", device=fine.device)
        parameter.copy_(round_stochastically(fine.detach(), generator))

    return turn
