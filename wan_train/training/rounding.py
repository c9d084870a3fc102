"""Optimizers for weights in bfloat16: each is made float32 for its step and rounded back at random.

An update below half of the last place of a bfloat16 weight is lost if it is rounded to the nearest; rounded up as often
as its size asks for, it is there in the mean (Gupta et al. 2015, section 3). One weight at a time is float32.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wan_train.cli import InputError

STEPS = "rounded_steps"  # in the first parameter group, so that a saved state holds it
# (module, class): those that treat each weight by itself, and take it in float32.
_BY_THEMSELVES = (
    *(("torch", name) for name in ("AdamW", "Adam", "SGD", "Adafactor")),
    ("transformers", "Adafactor"),
    ("came_pytorch", "CAME"),
)


def round_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """x, float32, as bfloat16: the neighbour above or below, each as often as x is near it.

    A number in [0, 2^16) is added to the bits that bfloat16 lacks, and these are cut off. What is not finite stays.
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    cut = ((x.contiguous().view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), cut, x).to(torch.bfloat16)


def check_rounding(kind: Any, name: str) -> None:
    """InputError for an optimizer class, called `name`, that cannot round so."""
    if (kind.__module__.partition(".")[0], kind.__name__) not in _BY_THEMSELVES:
        known = ", ".join(dict.fromkeys(name for _, name in _BY_THEMSELVES))
        raise InputError(f"--full_bf16 rounds at random, which --optimizer_type {name} cannot: take one of {known}")


@cache
def rounding(kind: Callable[..., torch.optim.Optimizer]) -> Any:
    """The class that steps as `kind` does, weights in bfloat16 one by one in float32.

    It takes `rounding_seed` besides; what is drawn depends on it, the number of steps taken and the weight's place.
    """
    base: Any = kind

    class Rounding(base):  # type: ignore[misc]
        param_groups: list[dict[str, Any]]

        def __init__(self, params: Any, *, rounding_seed: int, **arguments: Any) -> None:
            super().__init__(params, **arguments)
            self.rounding_seed = rounding_seed
            self.param_groups[0][STEPS] = 0

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            groups = self.param_groups
            place, count = 0, groups[0][STEPS]
            for group in groups:
                together = group["params"]
                self.param_groups = [group]
                try:
                    for parameter in together:
                        place += 1
                        if parameter.grad is not None:
                            group["params"] = [parameter]
                            self._step_one(parameter, f"{self.rounding_seed}/{count}/{place}")
                finally:
                    group["params"], self.param_groups = together, groups
            groups[0][STEPS] = count + 1

        def _step_one(self, parameter: Tensor, key: str) -> None:
            if parameter.dtype != torch.bfloat16:
                super().step()
                return
            grad, parameter.grad = parameter.grad, None
            assert grad is not None
            parameter.data = parameter.data.float()
            parameter.grad = grad.float()
            super().step()
            parameter.grad = None
            parameter.data = round_at_random(parameter.data, _generator(key, parameter.device))
            parameter.grad = grad

    Rounding.__name__, Rounding.__qualname__ = base.__name__, base.__qualname__
    return Rounding


def _generator(key: str, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(f"{key}/rounding".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)
