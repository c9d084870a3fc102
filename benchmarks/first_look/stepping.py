"""Training steps on random data, with the trainer's own loss and optimizers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.first_look.models import Built, Geometry, Mode
from networks.adapter import trains_weights
from wan_train.conditions.conditions import Conditions
from wan_train.placement.lanes import make_lane
from wan_train.placement.states import HostStates
from wan_train.placement.stream import Stream
from wan_train.training.objective.loss import Draws, measure
from wan_train.training.optimizing.fused import FusedBackward
from wan_train.training.optimizing.optimizers import make_optimizer
from wan_train.training.optimizing.rounding import rounded
from wan_train.training.optimizing.stepping import parts_of, states_at_hand
from wan_train.training.settings import OptimizerSettings

RATE = 1e-3
NUM_TEXT_TOKENS = 512


@dataclass(frozen=True)
class Stepper:
    """The optimizer of a model, and its stepping in the backward pass if the mode asks for it."""

    built: Built
    optimizer: torch.optim.Optimizer
    fused: FusedBackward | None = None
    trains_weights: bool = False

    def step(self, geometry: Geometry, number: int, device: torch.device) -> Tensor:
        """Take a step on the batch with this number; return the loss, on the device."""
        latents, conditions, draws = batch(geometry, number, device)
        loss = measure(self.built.model, latents, conditions, draws).mean
        loss.backward()
        if self.fused is not None:
            self.fused.finish()
        self.optimizer.step()
        if self.trains_weights:
            self.built.stream.settle()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def batch(geometry: Geometry, number: int, device: torch.device) -> tuple[Tensor, Conditions, Draws]:
    """Return latents (1, C, F, H, W), text, and noise with t, drawn on the CPU by the number."""
    generator = torch.Generator().manual_seed(100 + number)
    latents, noise = (torch.randn(1, *geometry.latents, generator=generator) for _ in range(2))
    text = torch.randn(NUM_TEXT_TOKENS, geometry.text_dim, generator=generator)
    draws = Draws(torch.tensor([0.3 + 0.1 * number]), noise)
    return latents.to(device), Conditions((text,)).to(device), draws.to(device)


def make_stepper(mode: Mode, built: Built, device: torch.device) -> Stepper:
    """Return the stepping of a mode, as the trainer would choose it."""
    groups = built.adapter.parameter_groups(RATE)
    settings = OptimizerSettings(optimizer_type=mode.optimizer, learning_rate=RATE)
    if not (mode.fused or mode.offload):
        return Stepper(built, make_optimizer(groups, settings))
    offloaded = [states_at_hand(HostStates(make_lane(device)))] if mode.offload else []
    contexts = [*offloaded, *([rounded(0)] if mode.network.full_bf16 else [])]
    optimizer = make_optimizer(groups, settings, step_contexts=contexts)
    trains = trains_weights(mode.network)
    streams: dict[str | None, Stream] = {None: built.stream} if trains else {}
    parts = parts_of(dict(built.adapter.named_parameters()), streams)
    optimizer.parts = parts  # type: ignore[attr-defined]
    optimizer.home = None if mode.offload else device  # type: ignore[attr-defined]
    fused = FusedBackward(optimizer, parts, limit=1.0) if mode.fused else None
    return Stepper(built, optimizer, fused, trains_weights=trains)


def recording_gradients(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return a mapping that gets each parameter's first gradient, on the CPU, before anything steps it.

    Call this before a fused backward pass registers its hooks, which free the gradients.
    """
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[Tensor], None]:
        def record(parameter: Tensor) -> None:
            if name not in seen and parameter.grad is not None:
                seen[name] = parameter.grad.detach().float().cpu()

        return record

    for name, parameter in parameters.items():
        parameter.register_post_accumulate_grad_hook(hook(name))
    return seen
