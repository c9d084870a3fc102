"""Optimizers for weights in bfloat16: each is made float32 for its step and rounded back stochastically.

An update below half of the last place of a bfloat16 weight is lost if it is rounded to the nearest; rounded up as often
as its size asks for, it is there in the mean (Gupta et al. 2015, section 3). One weight at a time is float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wan_train.errors import InputError
from wan_train.flow.keyed import generator_of
from wan_train.training.optimizing.one_by_one import StepContext

# By package: those that treat each weight by itself, and take it in float32. bitsandbytes has not been seen to.
_IN_FLOAT32 = {
    "torch": ("AdamW", "Adam", "SGD", "Adafactor"),
    "transformers": ("Adafactor",),
    "came_pytorch": ("CAME",),
    "wan_train": ("AdamW8bitSR",),
}


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """x, float32, as bfloat16: the neighbour above or below, each as often as x is near it.

    A number in [0, 2^16) is added to the bits that bfloat16 lacks, and these are cut off. What is not finite stays.
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    cut = ((x.contiguous().view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), cut, x).to(torch.bfloat16)


def check_rounding(optimizer_class: Any, name: str) -> None:
    """InputError for an optimizer class, called `name`, that cannot round so."""
    if optimizer_class.__name__ not in _IN_FLOAT32.get(optimizer_class.__module__.partition(".")[0], ()):
        known = ", ".join(dict.fromkeys(name for names in _IN_FLOAT32.values() for name in names))
        raise InputError(
            f"--full_bf16 needs stochastic rounding, which --optimizer_type {name} does not support: use one of {known}"
        )


def rounded(seed: int) -> StepContext:
    """Lets a float32 weight stand in for one in bfloat16, and rounds it back by draws that `seed` keys."""

    @contextmanager
    def turn(optimizer: Any, parameter: nn.Parameter, key: str) -> Iterator[nn.Parameter]:
        if parameter.dtype != torch.bfloat16:
            yield parameter
            return
        # Not `parameter.data`, made float32: whoever counts on its gradients (data-parallel training) would lose it.
        fine = nn.Parameter(parameter.detach().float())
        assert parameter.grad is not None
        fine.grad = parameter.grad.float()
        optimizer.state[fine] = optimizer.state.pop(parameter, {})
        yield fine
        optimizer.state[parameter] = optimizer.state.pop(fine)
        generator = generator_of(f"{seed}/{key}/rounding", device=fine.device)
        parameter.copy_(round_stochastically(fine.detach(), generator))

    return turn
