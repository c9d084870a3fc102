"""Estimate the memory of an optimizer's states, and of its step, by running it on the meta device."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wan_train.placement.ledger import WORK, Ledger
from wan_train.plan import META, size
from wan_train.training.optimizing.optimizer_state import for_training
from wan_train.training.optimizing.optimizers import check_optimizer
from wan_train.training.settings import OptimizerSettings

_SMALL = 128  # rows and columns of the weight that an optimizer is tried on


@dataclass(frozen=True)
class StateBytes:
    """Bytes of an optimizer's states after its first step, the peak of temporary memory in the step of one weight, and
    the peak of states on the device at once when they are kept in CPU RAM."""

    kept: int
    step: int
    at_hand: int


def states_of(trained: Iterable[nn.Parameter], settings: OptimizerSettings) -> StateBytes:
    """Estimate the memory of the optimizer's states for these weights.

    Weights in bfloat16 are stepped in float32. An optimizer that cannot run on the meta device is tried on a small
    weight; its states are assumed to scale with the weights, and the temporary memory of its step is unknown and
    reported as 0.
    """
    kind, arguments = check_optimizer(settings)
    weights = [nn.Parameter(torch.empty(p.shape, device=META, dtype=torch.float32)) for p in trained]
    widest = max(weights, key=torch.numel)
    try:
        every = tried(kind, weights, arguments)
        each = [state_bytes(every.state[weight]) for weight in weights]
        kept = state_bytes(every.state)
        alone = tried(kind, [widest], arguments)
        ledger = Ledger()
        with ledger:
            stand_in = torch.empty_like(widest)
            take_step(alone, [widest])
        del stand_in
    except Exception:  # any error of an optimizer that reads values
        small = nn.Parameter(torch.ones(_SMALL, _SMALL))
        for_each = state_bytes(tried(kind, [small], arguments).state) / small.numel()
        each = [round(for_each * weight.numel()) for weight in weights]
        return StateBytes(round(for_each * sum(map(torch.numel, weights))), 0, most_at_hand(each))
    return StateBytes(kept, ledger.most[WORK], most_at_hand(each))


def most_at_hand(each: list[int]) -> int:
    """Return the peak bytes of the states of three consecutive weights: the one being stepped, the previous one on its
    way to CPU RAM, and the next one being fetched. See `HostStates`."""
    return max(sum(each[place : place + 3]) for place in range(max(1, len(each) - 2)))


def tried(optimizer_class: Any, weights: list[nn.Parameter], arguments: dict[str, Any]) -> torch.optim.Optimizer:
    """Return an optimizer after its first step."""
    optimizer: torch.optim.Optimizer = optimizer_class([{"params": weights}], **arguments)
    for_training(optimizer)
    take_step(optimizer, weights)
    return optimizer


def state_bytes(states: Mapping[Any, Any]) -> int:
    """Return the bytes of all tensors in the states of one weight, or of all weights."""
    kept = {tensor.untyped_storage()._cdata: size(tensor) for tensor in tensors_in(list(states.values()))}
    return sum(kept.values())


def take_step(optimizer: torch.optim.Optimizer, weights: Iterable[nn.Parameter]) -> None:
    """Take a step with arbitrary gradients; for bitsandbytes, whose kernels need real data, only create the states."""
    weights = list(weights)
    if callable(getattr(optimizer, "init_state", None)):
        for place, weight in enumerate(weights):
            if not optimizer.state[weight]:
                optimizer.init_state(optimizer.param_groups[0], weight, 0, place)  # type: ignore[attr-defined]
        return
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    optimizer.step()
    for weight in weights:
        weight.grad = None


def tensors_in(value: object) -> Iterable[Tensor]:
    """Yield all tensors in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif not isinstance(value, str) and isinstance(value, Iterable):
        for member in value:
            yield from tensors_in(member)
