"""Full fine-tuning: the model's own weights are what is trained, all of them or those that patterns choose.

What is trained is kept in float32, whatever the file stores; each product casts it. With `--full_bf16` matrices are
kept in bfloat16, and an optimizer with stochastic rounding is asked for; norms, biases and modulations stay float32. A
saved file is a checkpoint under the official names, the weights that were not trained among the others.
"""

import fnmatch
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from networks.norms import Norms
from networks.settings import NetworkSettings, read_arguments
from wan_train.errors import InputError

TRAINS_WEIGHTS = True  # of the model itself, which then cannot be in 8 bits or elsewhere
CONTROLLER = "motion_controller."  # trained by itself it is saved by itself, under the names of its published file
_OF_LORA = ("network_dim", "network_dropout", "network_weights", "dim_from_weights", "scale_weight_norms")


class Full:
    """Weights of a model, as an `Adapter`."""

    def __init__(self, model: nn.Module, names: Collection[str], settings: NetworkSettings) -> None:
        self._model, self._settings = model, settings
        self._names = [name for name, _ in model.named_parameters()]  # a LoRA may add its own
        self._trained: dict[str, nn.Parameter] = {}
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name in names:
                is_matrix = name.endswith(".weight") and parameter.ndim > 1
                coarse = settings.full_bf16 and is_matrix
                parameter.data = parameter.data.to(torch.bfloat16 if coarse else torch.float32)
                parameter.requires_grad_(True)
                self._trained[name] = parameter

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """One group of all that is trained."""
        return [{"params": list(self._trained.values()), "lr": learning_rate}]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, under its official name."""
        yield from self._trained.items()

    def export(self, read: Callable[[nn.Parameter], Tensor] = Tensor.detach) -> dict[str, Tensor]:
        """The whole model under official names, each tensor as it is kept; a motion controller alone where nothing else
        is trained, as `--motion_controller` reads it."""
        if all(name.startswith(CONTROLLER) for name in self._trained):
            return {name.removeprefix(CONTROLLER): read(parameter) for name, parameter in self._trained.items()}
        return {name: read(parameter) for name, parameter in self._own().items()}

    def metadata(self) -> dict[str, str]:
        """Which module trained it, and what of it."""
        rows = {"ss_network_module": self._settings.network_module}
        return rows | ({"wan_train_trainable": " ".join(self._settings.trainable)} if self._settings.trainable else {})

    def describe(self) -> str:
        """How many weights are trained, of how many."""
        trained, every = (sum(map(torch.numel, some.values())) for some in (self._trained, self._own()))
        return f"full fine-tuning of {trained:,} weights of {every:,}"

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `export` gave. InputError where something trained is missing or of another shape."""
        alone = all(name.startswith(CONTROLLER) for name in self._trained)
        for name, parameter in self._trained.items():
            given = tensors.get(name.removeprefix(CONTROLLER) if alone else name)
            if given is None or given.shape != parameter.shape:
                raise InputError(f"the checkpoint has no {name} of {list(parameter.shape)}: give one of this model")
            parameter.copy_(given)

    def _own(self) -> dict[str, nn.Parameter]:
        named = dict(self._model.named_parameters())
        return {name: named[name] for name in self._names}

    def disabled(self) -> AbstractContextManager[None]:
        """Not to be had: the weights that the model began with are gone."""
        raise InputError("--prior_captions: full fine-tuning keeps no copy of the model as it was: leave them out")

    def norm(self) -> float:
        """The length of all that is trained."""
        norms = [parameter.detach().norm().float().cpu() for parameter in self._trained.values()]  # some may be there
        return float(torch.stack(norms).norm())

    def scale_norms(self, limit: float) -> Norms:
        """Refused by `check`."""
        raise InputError(f"--scale_weight_norms {limit:g} is for LoRA: leave it out")


def check(settings: NetworkSettings) -> None:
    """InputError for options that are a LoRA's, unless one is trained beside."""
    if settings.train_also is not None:
        return
    for name in _OF_LORA:
        if getattr(settings, name):
            raise InputError(f"--{name} is for LoRA, and --network_module {settings.network_module} trains the weights")
    read_arguments(settings, ())


def check_names(settings: NetworkSettings, names: Collection[str]) -> None:
    """InputError for `--trainable` patterns that match none of a model's tensors."""
    chosen_names(settings, names)


def attach(model: nn.Module, settings: NetworkSettings, *, seed: int = 0) -> Full:
    """Make weights of the model trainable; nothing is drawn, so that `seed` does not matter."""
    names = chosen_names(settings, [name for name, _ in model.named_parameters()])
    return Full(model, names, settings)


def chosen_names(settings: NetworkSettings, names: Collection[str]) -> set[str]:
    """Of the tensors' names those that a `--trainable` pattern matches, all without patterns."""
    if not settings.trainable:
        return set(names)
    chosen: set[str] = set()
    for pattern in settings.trainable:
        found = fnmatch.filter(names, pattern)
        if not found:
            some = ", ".join(sorted(names)[:3])
            raise InputError(f"--trainable {pattern}: no tensor of the model is called so; they are called as {some}")
        chosen.update(found)
    return chosen
