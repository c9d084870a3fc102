"""LoRA on a Wan DiT: every Linear inside its blocks."""

from torch import nn

from networks.lora_adapter import Lora
from networks.settings import NetworkSettings, read_arguments


def check(settings: NetworkSettings) -> None:
    """InputError for `--network_args` that this network does not take."""
    read_arguments(settings, known=())


def attach(model: nn.Module, settings: NetworkSettings, *, seed: int = 0) -> Lora:
    """Freeze `model` and give each target a trainable pair; the model computes as before until it is trained."""
    check(settings)
    model.requires_grad_(False)
    return Lora(targets(model), settings, seed=seed)


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linears inside `blocks` by dotted name, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear)
    }
