"""Train weights of a model together with a LoRA on its other Linears: `--train_also`."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from networks import lora_wan
from networks.deltas.branch import branch_targets
from networks.formats.kinds import Shape
from networks.full import Full
from networks.lora_adapter import Lora
from networks.norms import Norms
from networks.settings import NetworkSettings
from wan_train.errors import InputError

LORA = "lora"  # suffix of its file's name
KNOWN = "networks.lora_wan"


def lora_settings(settings: NetworkSettings) -> NetworkSettings:
    """Return the settings of the LoRA alone."""
    return replace(settings, network_module=KNOWN, train_also=None, trainable=(), full_bf16=False)


def check_both(settings: NetworkSettings, linears: Mapping[str, Shape], trained: Collection[str]) -> None:
    """Raise InputError if a LoRA cannot be trained beside the `trained` tensors of a model with these `linears`."""
    if settings.train_also != KNOWN:
        raise InputError(f"--train_also {settings.train_also} is not supported: use {KNOWN}")
    if not settings.trainable:
        raise InputError("--train_also needs --trainable: otherwise all weights are trained, leaving none for a LoRA")
    rest = without_trained(linears, trained)
    if not lora_wan.in_blocks(rest):
        raise InputError(
            "--train_also: the --trainable patterns leave no Linear layer in the blocks for a LoRA: remove it"
        )
    lora_wan.check(lora_settings(settings))
    lora_wan.check_model(lora_settings(settings), rest)


def weights_of_lora(settings: NetworkSettings, linears: Mapping[str, Shape], trained: Collection[str]) -> set[str]:
    """Return the weights changed by the LoRA beside the `trained` tensors of a model with these `linears`."""
    modules = lora_wan.chosen_modules(lora_settings(settings), without_trained(linears, trained))
    return {f"{module}.weight" for module in modules}


def without_trained(linears: Mapping[str, Any], trained: Collection[str]) -> dict[str, Any]:
    """Return the `linears`, by module name, whose weights are not among the `trained` tensors."""
    return {name: linear for name, linear in linears.items() if f"{name}.weight" not in trained}


class Both:
    """Both networks as one `Adapter`; `parts` are saved to separate files, by file name suffix."""

    def __init__(self, full: Full, model: nn.Module, settings: NetworkSettings, *, seed: int) -> None:
        rest = without_trained(branch_targets(model), dict(full.named_parameters()))
        self.full, self.lora = full, lora_wan.attach_to(rest, lora_settings(settings), seed=seed)
        self.parts: dict[str | None, Full | Lora] = {None: self.full, LORA: self.lora}

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return the groups of the weights, then those of the LoRA."""
        return [*self.full.parameter_groups(learning_rate), *self.lora.parameter_groups(learning_rate)]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained parameters of both, under their own names."""
        yield from self.full.named_parameters()
        yield from self.lora.named_parameters()

    def export(self, read: Callable[[nn.Parameter], Tensor] = Tensor.detach) -> dict[str, Tensor]:
        """Return the tensors of both; they are saved to separate files."""
        return self.full.export(read) | self.lora.export(read)

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the weights; the LoRA's file has its own."""
        return self.full.metadata()

    def describe(self) -> str:
        """Return the descriptions of both."""
        return f"{self.full.describe()}, and {self.lora.describe()}"

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors of `export`."""
        of_lora = self.lora.export().keys()
        self.full.load({name: tensor for name, tensor in tensors.items() if name not in of_lora})
        self.lora.load({name: tensor for name, tensor in tensors.items() if name in of_lora})

    def disabled(self) -> AbstractContextManager[None]:
        """Raise InputError: see `Full.disabled`."""
        return self.full.disabled()

    def norm(self) -> float:
        """Return the norm of all trained weights and the LoRA's change together."""
        return math.hypot(self.full.norm(), self.lora.norm())

    def scale_norms(self, limit: float) -> Norms:
        """Limit the norms of the LoRA only."""
        return self.lora.scale_norms(limit)
