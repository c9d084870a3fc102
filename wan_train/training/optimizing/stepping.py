"""Step the trained parameters: all at once after the backward pass, or in parts, as memory options require."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from networks.adapter import Adapter, trains_weights
from wan_train.errors import InputError, first_given
from wan_train.models.dit.experts import ORDER
from wan_train.models.stacks import read_block_name
from wan_train.placement.lanes import make_lane
from wan_train.placement.states import HostStates
from wan_train.placement.stream import Stream
from wan_train.training.optimizing.fused import FusedBackward
from wan_train.training.optimizing.one_by_one import Part, StepContext, can_step_one_by_one
from wan_train.training.optimizing.optimizers import find_optimizer, make_optimizer
from wan_train.training.optimizing.rounding import rounded
from wan_train.training.settings import TrainSettings

if TYPE_CHECKING:  # stepping itself works where accelerate is not installed
    from accelerate import Accelerator

Streams = Mapping[str | None, Stream]  # by expert


@dataclass(frozen=True)
class Stepping:
    """The optimizer, the fused backward pass, if used, and functions that wait for copies to CPU RAM: after `settle`
    everything kept there is up to date; after `forget` none of it is on the device either."""

    optimizer: torch.optim.Optimizer
    fused: FusedBackward | None
    settle: Callable[[], None]
    forget: Callable[[], None]


def needs_parts(settings: TrainSettings) -> str | None:
    """Return the option that requires stepping one weight at a time; None if there is none."""
    swaps = settings.stream.blocks_to_swap > 0 and trains_weights(settings.network)
    given = {
        "--fused_backward_pass": settings.optimizer.fused_backward_pass,
        "--optimizer_cpu_offload": settings.optimizer.optimizer_cpu_offload,
        "--blocks_to_swap": swaps,
    }
    return first_given(given)


def check_stepping(settings: TrainSettings) -> None:
    """Raise InputError for options that conflict with a fused backward pass or with trained, streamed blocks."""
    from wan_train.training.accelerator import launched_dtype

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not settings.optimizer.fused_backward_pass:
        if needs_parts(settings) == "--blocks_to_swap" and several:
            raise InputError(
                "--blocks_to_swap with trained weights and several processes needs --fused_backward_pass: add it"
            )
        return
    given = {
        f"--gradient_accumulation_steps {settings.loop.gradient_accumulation_steps}": (
            settings.loop.gradient_accumulation_steps > 1
        ),
        "--prior_captions": settings.prior.prior_captions is not None,
        "fp16, whose gradients are scaled,": launched_dtype(settings.loop) == torch.float16,
    }
    if label := first_given(given):
        raise InputError(f"--fused_backward_pass steps in every backward pass, which does not work with {label}")


def make_stepping(
    adapter: Adapter,
    streams: Streams,
    settings: TrainSettings,
    accelerator: "Accelerator",
    *,
    warmup: int,
    seed: int,
) -> Stepping:
    """Create the optimizer, and the fused backward pass and step contexts that the options ask for."""
    groups = adapter.parameter_groups(settings.optimizer.learning_rate)
    if not trains_weights(settings.network):
        streams = {}  # frozen weights in CPU RAM do not change
    step_contexts, settled = [], [stream.settle for stream in streams.values()]
    if settings.optimizer.optimizer_cpu_offload:
        states = HostStates(make_lane(accelerator.device))
        step_contexts.append(states_at_hand(states))
        settled.append(states.settle)
    if settings.network.full_bf16:
        step_contexts.append(rounded(seed))
    # Stepping all at once needs a temporary copy of the weights, which is small for a LoRA.
    whole = trains_weights(settings.network) and can_step_one_by_one(find_optimizer(settings.optimizer.optimizer_type))
    needs_one_by_one = step_contexts or whole or needs_parts(settings)
    optimizer = make_optimizer(
        groups,
        settings.optimizer,
        warmup=warmup,
        step_contexts=step_contexts if needs_one_by_one else None,
        device=accelerator.device,
    )
    fused = None
    if needs_one_by_one:
        parts = parts_of(dict(adapter.named_parameters()), streams)
        optimizer.parts = parts  # type: ignore[attr-defined]
        away = settings.optimizer.optimizer_cpu_offload
        optimizer.home = None if away else accelerator.device  # type: ignore[attr-defined]
        optimizer.stepped_on = accelerator.device  # type: ignore[attr-defined]
        if settings.optimizer.fused_backward_pass:
            reduce = partial(accelerator.reduce, reduction="mean") if accelerator.num_processes > 1 else None
            limit = settings.loop.max_grad_norm or float("inf")
            fused = FusedBackward(optimizer, parts, limit=limit, reduce=reduce)
    forgotten = [stream.forget for stream in streams.values()]
    return Stepping(optimizer, fused, partial(_call, settled), partial(_call, forgotten + settled))


def parts_of(trained: Mapping[str, nn.Parameter], streams: Streams) -> tuple[Part, ...]:
    """Divide the trained parameters into parts: one for each block, and one for each other top-level module, separately
    for each expert."""
    members: dict[tuple[str | None, str], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        first, _, rest = name.partition(".")
        expert, inner = (first, rest) if first in ORDER else (None, name)
        block = read_block_name(inner)
        part = inner.partition(".")[0] if block is None else block.block
        members.setdefault((expert, part), []).append(parameter)
    parts = []
    for (expert, part), own in members.items():
        stream = streams.get(expert)
        held: Callable[[], AbstractContextManager[None]] = nullcontext if stream is None else partial(stream.held, own)
        parts.append(Part(part if expert is None else f"{expert}.{part}", tuple(own), held))
    return tuple(parts)


def states_at_hand(states: HostStates) -> StepContext:
    """Return a step context that brings the states of a weight to the device for its step."""

    @contextmanager
    def turn(optimizer: Any, parameter: nn.Parameter, key: str) -> Iterator[nn.Parameter]:
        with states.at_hand(parameter, optimizer.state[parameter]):
            yield parameter

    return turn


def _call(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()
