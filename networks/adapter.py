"""The common interface of everything that can be trained: LoRA and full fine-tuning."""

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
    """The trainable part of a model, created by a network module's `attach`, which alone makes parameters trainable."""

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return parameter groups for the optimizer, each with `params` and `lr`."""
        ...

    def export(self, read: Callable[[nn.Parameter], Tensor] = Tensor.detach) -> dict[str, Tensor]:
        """Return the tensors of the saved file; `read` returns the value to save of each parameter, such as its EMA."""
        ...

    def metadata(self) -> dict[str, str]:
        """Return the `ss_network_*` entries of the saved file."""
        ...

    def describe(self) -> str:
        """Return one or two lines for the log."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors of `export`, or of another file of this type. Raises InputError unless all of them fit."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained parameters with their names in the bare model, in a fixed order."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """Return a context in which the model computes as if it had never been trained."""
        ...

    def norm(self) -> float:
        """Return the norm of the learnt change of all weights together."""
        ...

    def scale_norms(self, limit: float) -> Norms:
        """Limit the norm of each module's change to `limit`; call it after each optimizer step."""
        ...


def create(model: nn.Module, settings: NetworkSettings, *, seed: int = 0) -> Adapter:
    """Attach the network selected by the settings to `model`; `seed` determines its initial values."""
    adapter: Adapter = check_module(settings).attach(model, settings, seed=seed)
    return Both(adapter, model, settings, seed=seed) if isinstance(adapter, Full) and settings.train_also else adapter


def check_network(settings: NetworkSettings, linears: Mapping[str, Shape], names: Collection[str] = ()) -> None:
    """Raise InputError if a network, or its LoRA files to start from, do not fit a model.

    The model has these `linears`, (out, in) by official module name, and tensors of these `names`, as in a checkpoint's
    header. Only headers are read.
    """
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
                raise InputError(f"{flag} is only for --network_module networks.full: remove it")


def trains_weights(settings: NetworkSettings) -> bool:
    """Return whether the network trains the model's own weights, so that a saved file is a checkpoint."""
    return bool(getattr(check_module(settings), "TRAINS_WEIGHTS", False))


def check_module(settings: NetworkSettings) -> ModuleType:
    """Return the module of `--network_module`. Raises InputError if it is not a network module or rejects its
    `--network_args`.

    A network module has `attach(model, settings, *, seed) -> Adapter`, and may have `check(settings)`,
    `check_model(settings, linears)` and `check_names(settings, names)`, which reject, without a model, what it does not
    support in general or on such a model. A module with TRAINS_WEIGHTS trains the model's own weights.
    """
    name = settings.network_module
    known = f"built-in modules are {', '.join(MODULES)}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name and not f"{name}.".startswith(f"{problem.name}."):
            raise InputError(missing(f"--network_module {name}", problem.name, install="install it")) from None
        raise InputError(f"no --network_module {name!r}: {known}{nearest(name, MODULES)}") from None
    except (TypeError, ValueError):  # relative and empty names
        raise InputError(f"--network_module {name!r} is not a module name: {known}") from None
    if not callable(getattr(module, "attach", None)):
        raise InputError(f"--network_module {name} has no attach(model, settings): {known}{nearest(name, MODULES)}")
    if callable(getattr(module, "check", None)):
        module.check(settings)
    return module
