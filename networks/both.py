"""Weights of a model and a LoRA on others of its Linears, trained together: `--train_also`."""

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

LORA = "lora"  # what is added to the name of its file
KNOWN = "networks.lora_wan"


def lora_settings(settings: NetworkSettings) -> NetworkSettings:
    """Those of the LoRA alone."""
    return replace(settings, network_module=KNOWN, train_also=None, trainable=(), full_bf16=False)


def check_both(settings: NetworkSettings, linears: Mapping[str, Shape], trained: Collection[str]) -> None:
    """InputError for a LoRA that cannot be trained beside the `trained` tensors of a model with these `linears`."""
    if settings.train_also != KNOWN:
        raise InputError(f"--train_also {settings.train_also}: the one that can be trained beside weights is {KNOWN}")
    if not settings.trainable:
        raise InputError("--train_also trains a LoRA on what --trainable leaves, and without that it leaves nothing")
    rest = without_trained(linears, trained)
    if not lora_wan.in_blocks(rest):
        raise InputError("--train_also: the --trainable patterns leave no Linear of the blocks: leave it out")
    lora_wan.check(lora_settings(settings))
    lora_wan.check_model(lora_settings(settings), rest)


def weights_of_lora(settings: NetworkSettings, linears: Mapping[str, Shape], trained: Collection[str]) -> set[str]:
    """The weights that the LoRA beside the `trained` tensors changes, of a model with these `linears`."""
    modules = lora_wan.chosen_modules(lora_settings(settings), without_trained(linears, trained))
    return {f"{module}.weight" for module in modules}


def without_trained(linears: Mapping[str, Any], trained: Collection[str]) -> dict[str, Any]:
    """Those of the `linears`, by module name, whose weight is not among the `trained` tensors."""
    return {name: linear for name, linear in linears.items() if f"{name}.weight" not in trained}


class Both:
    """The two as one `Adapter`; `parts` are what is saved apart, by what is added to the file's name."""

    def __init__(self, full: Full, model: nn.Module, settings: NetworkSettings, *, seed: int) -> None:
        rest = without_trained(branch_targets(model), dict(full.named_parameters()))
        self.full, self.lora = full, lora_wan.attach_to(rest, lora_settings(settings), seed=seed)
        self.parts: dict[str | None, Full | Lora] = {None: self.full, LORA: self.lora}

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The groups of the weights, then those of the LoRA."""
        return [*self.full.parameter_groups(learning_rate), *self.lora.parameter_groups(learning_rate)]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained of both, each under its own name."""
        yield from self.full.named_parameters()
        yield from self.lora.named_parameters()

    def export(self, read: Callable[[nn.Parameter], Tensor] = Tensor.detach) -> dict[str, Tensor]:
        """Both; files hold each by itself."""
        return self.full.export(read) | self.lora.export(read)

    def metadata(self) -> dict[str, str]:
        """That of the weights; the LoRA's file has its own."""
        return self.full.metadata()

    def describe(self) -> str:
        """Both in words."""
        return f"{self.full.describe()}, and {self.lora.describe()}"

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `export` gave."""
        of_lora = self.lora.export().keys()
        self.full.load({name: tensor for name, tensor in tensors.items() if name not in of_lora})
        self.lora.load({name: tensor for name, tensor in tensors.items() if name in of_lora})

    def disabled(self) -> AbstractContextManager[None]:
        """Not to be had: see `Full.disabled`."""
        return self.full.disabled()

    def norm(self) -> float:
        """The length of all trained weights and of the LoRA's change together."""
        return math.hypot(self.full.norm(), self.lora.norm())

    def scale_norms(self, limit: float) -> Norms:
        """Of the LoRA alone."""
        return self.lora.scale_norms(limit)
