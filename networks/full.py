"""Full fine-tuning: train the model's own weights, all of them or those that match patterns.

Trained weights are kept in float32, whatever the dtype of the file, and cast for each product. With `--full_bf16`,
matrices are kept in bfloat16, which needs an optimizer with stochastic rounding; norms, biases and modulations stay
float32. A saved file is a checkpoint with the official names, including the weights that were not trained.
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

TRAINS_WEIGHTS = True  # of the model itself, which then can be neither 8-bit nor offloaded
CONTROLLER = "motion_controller."  # if only it is trained, only it is saved, with the names of its published file
_OF_LORA = ("network_dim", "network_dropout", "network_weights", "dim_from_weights", "scale_weight_norms")


class Full:
    """The weights of a model as an `Adapter`."""

    def __init__(self, model: nn.Module, names: Collection[str], settings: NetworkSettings) -> None:
        self._model, self._settings = model, settings
        self._names = [name for name, _ in model.named_parameters()]  # read now: a LoRA may add parameters later
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
        """Return one group with all trained parameters."""
        return [{"params": list(self._trained.values()), "lr": learning_rate}]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained parameters by official name."""
        yield from self._trained.items()

    def export(self, read: Callable[[nn.Parameter], Tensor] = Tensor.detach) -> dict[str, Tensor]:
        """Return the whole model by official names, each tensor as it is kept; if only a motion controller is trained,
        return it alone, in the format of `--motion_controller`."""
        if all(name.startswith(CONTROLLER) for name in self._trained):
            return {name.removeprefix(CONTROLLER): read(parameter) for name, parameter in self._trained.items()}
        return {name: read(parameter) for name, parameter in self._own().items()}

    def metadata(self) -> dict[str, str]:
        """Return the network module, and the patterns of the trained weights."""
        rows = {"ss_network_module": self._settings.network_module}
        return rows | ({"wan_train_trainable": " ".join(self._settings.trainable)} if self._settings.trainable else {})

    def describe(self) -> str:
        """Return the number of trained weights and of all weights."""
        trained, every = (sum(map(torch.numel, some.values())) for some in (self._trained, self._own()))
        return f"full fine-tuning of {trained:,} weights of {every:,}"

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors of `export`. Raises InputError if a trained one is missing or differs in shape."""
        alone = all(name.startswith(CONTROLLER) for name in self._trained)
        for name, parameter in self._trained.items():
            given = tensors.get(name.removeprefix(CONTROLLER) if alone else name)
            if given is None or given.shape != parameter.shape:
                raise InputError(
                    f"the checkpoint has no {name} of shape {list(parameter.shape)}: use a checkpoint of this model"
                )
            parameter.copy_(given)

    def _own(self) -> dict[str, nn.Parameter]:
        named = dict(self._model.named_parameters())
        return {name: named[name] for name in self._names}

    def disabled(self) -> AbstractContextManager[None]:
        """Raise InputError: the initial weights are not kept."""
        raise InputError("--prior_captions: full fine-tuning keeps no copy of the original model: remove them")

    def norm(self) -> float:
        """Return the norm of all trained weights."""
        norms = [parameter.detach().norm().float().cpu() for parameter in self._trained.values()]  # some may be there
        return float(torch.stack(norms).norm())

    def scale_norms(self, limit: float) -> Norms:
        """Raise InputError; `check` rejects the option earlier."""
        raise InputError(f"--scale_weight_norms {limit:g} is only for LoRA: remove it")


def check(settings: NetworkSettings) -> None:
    """Raise InputError for options of a LoRA, unless one is trained too."""
    if settings.train_also is not None:
        return
    for name in _OF_LORA:
        if getattr(settings, name):
            raise InputError(
                f"--{name} is only for LoRA, and --network_module {settings.network_module} trains the weights:"
                " remove it"
            )
    read_arguments(settings, ())


def check_names(settings: NetworkSettings, names: Collection[str]) -> None:
    """Raise InputError for `--trainable` patterns that match none of a model's tensors."""
    chosen_names(settings, names)


def attach(model: nn.Module, settings: NetworkSettings, *, seed: int = 0) -> Full:
    """Make weights of the model trainable; `seed` is unused, as nothing is drawn."""
    names = chosen_names(settings, [name for name, _ in model.named_parameters()])
    return Full(model, names, settings)


def chosen_names(settings: NetworkSettings, names: Collection[str]) -> set[str]:
    """Return the tensor names that match a `--trainable` pattern; all of them without patterns."""
    if not settings.trainable:
        return set(names)
    chosen: set[str] = set()
    for pattern in settings.trainable:
        found = fnmatch.filter(names, pattern)
        if not found:
            some = ", ".join(sorted(names)[:3])
            raise InputError(
                f"--trainable {pattern} matches none of the model's tensors, which have names such as {some}"
            )
        chosen.update(found)
    return chosen
