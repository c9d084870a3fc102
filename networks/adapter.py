"""What is trained, as the trainer sees it: LoRA and full fine-tuning answer alike."""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol

from torch import Tensor, nn

from networks.settings import NetworkSettings
from wan_train.cli import InputError, nearest

MODULES = ("networks.lora_wan",)


class Adapter(Protocol):
    """The trainable part of a model. `attach` of a network module makes one; it alone makes parameters trainable."""

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Groups for the optimizer, each with its `params` and `lr`."""
        ...

    def export(self) -> dict[str, Tensor]:
        """What the saved file holds, float32, on the device of the parameters."""
        ...

    def metadata(self) -> dict[str, str]:
        """The `ss_network_*` rows of the saved file."""
        ...

    def describe(self) -> str:
        """One or two lines for the log."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `export` gave, or another file of this kind. InputError unless it fits in every part."""
        ...


def create(model: nn.Module, settings: NetworkSettings, *, seed: int = 0) -> Adapter:
    """Attach the network that the settings name to `model`; `seed` keys its initial values."""
    adapter: Adapter = check_module(settings).attach(model, settings, seed=seed)
    return adapter


def check_module(settings: NetworkSettings) -> ModuleType:
    """The module behind `--network_module`; InputError if it is none, or does not take its `--network_args`.

    A network module has `attach(model, settings, *, seed) -> Adapter`, and may have `check(settings)` that refuses,
    without a model, what it cannot do.
    """
    name = settings.network_module
    known = f"known are {', '.join(MODULES)}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name and not f"{name}.".startswith(f"{problem.name}."):
            raise InputError(f"--network_module {name} needs the package {problem.name}: install it") from None
        raise InputError(f"no --network_module {name!r}: {known}{nearest(name, MODULES)}") from None
    except (TypeError, ValueError):  # relative and empty names
        raise InputError(f"--network_module {name!r} is not a module's name: {known}") from None
    if not callable(getattr(module, "attach", None)):
        raise InputError(f"--network_module {name} has no attach(model, settings): {known}{nearest(name, MODULES)}")
    if callable(getattr(module, "check", None)):
        module.check(settings)
    return module
