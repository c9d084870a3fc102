"""What is trained, as the trainer sees it: LoRA and full fine-tuning answer alike."""

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Protocol

from torch import Tensor, nn

from networks.both import Both, check_both
from networks.formats.files import check_deltas
from networks.formats.kinds import Shape
from networks.full import Full, chosen_names
from networks.norms import Norms
from networks.settings import NetworkSettings
from wan_train.cli import nearest
from wan_train.errors import InputError
from wan_train.packages import missing

MODULES = ("networks.lora_wan", "networks.full")


class Adapter(Protocol):
    """The trainable part of a model. `attach` of a network module makes one; it alone makes parameters trainable."""

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Groups for the optimizer, each with its `params` and `lr`."""
        ...

    def export(self, read: Callable[[nn.Parameter], Tensor] = Tensor.detach) -> dict[str, Tensor]:
        """What the saved file holds, of each parameter what `read` gives: as it is, or an average of it."""
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

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, under the names that the bare model has for it, in an order that does not change."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """While it lasts the model computes as if it had never been trained."""
        ...

    def norm(self) -> float:
        """The length of what was learnt: of the change of all weights together."""
        ...

    def scale_norms(self, limit: float) -> Norms:
        """Shrink each module's change to this norm at most, to be called after each step of the optimizer."""
        ...


def create(model: nn.Module, settings: NetworkSettings, *, seed: int = 0) -> Adapter:
    """Attach the network that the settings name to `model`; `seed` keys its initial values."""
    adapter: Adapter = check_module(settings).attach(model, settings, seed=seed)
    return Both(adapter, model, settings, seed=seed) if isinstance(adapter, Full) and settings.train_also else adapter


def check_network(settings: NetworkSettings, linears: Mapping[str, Shape], names: Collection[str] = ()) -> None:
    """InputError for a network, or LoRA files to begin with, that do not fit a model with these `linears`, (out, in) by
    official module name, and tensors of these `names`, as a checkpoint's header tells them. Nothing but headers is
    read."""
    for path, _ in settings.base_loras:
        check_deltas(path, linears)
    module = check_module(settings)
    if callable(getattr(module, "check_model", None)):
        module.check_model(settings, linears)
    if callable(getattr(module, "check_names", None)):
        module.check_names(settings, names)
        if settings.train_also is not None:
            check_both(settings, linears, chosen_names(settings, names))
    else:
        for flag in ("--trainable", "--full_bf16", "--train_also"):
            if getattr(settings, flag[2:]):
                raise InputError(f"{flag} is for --network_module networks.full, which trains weights: leave it out")


def trains_weights(settings: NetworkSettings) -> bool:
    """Whether the network trains the model's own weights, so that a saved file is a checkpoint."""
    return bool(getattr(check_module(settings), "TRAINS_WEIGHTS", False))


def check_module(settings: NetworkSettings) -> ModuleType:
    """The module behind `--network_module`; InputError if it is none, or does not take its `--network_args`.

    A network module has `attach(model, settings, *, seed) -> Adapter`, and may have `check(settings)`,
    `check_model(settings, linears)` and `check_names(settings, names)` that refuse, without a model, what it cannot do
    at all or on such a model. One with TRAINS_WEIGHTS trains the model's own weights.
    """
    name = settings.network_module
    known = f"known are {', '.join(MODULES)}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name and not f"{name}.".startswith(f"{problem.name}."):
            raise InputError(missing(f"--network_module {name}", problem.name, install="install it")) from None
        raise InputError(f"no --network_module {name!r}: {known}{nearest(name, MODULES)}") from None
    except (TypeError, ValueError):  # relative and empty names
        raise InputError(f"--network_module {name!r} is not a module's name: {known}") from None
    if not callable(getattr(module, "attach", None)):
        raise InputError(f"--network_module {name} has no attach(model, settings): {known}{nearest(name, MODULES)}")
    if callable(getattr(module, "check", None)):
        module.check(settings)
    return module
