"""An optimizer's modes, effective learning rates and portable state."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KERNEL_CHOICES = ("fused", "foreach")  # in parameter groups of torch's optimizers: how they step, not what


def comes_from(optimizer_class: Any, package: str, name: str) -> bool:
    """Return whether a class is, or inherits from, `name` of `package`, which need not be installed."""
    return any(
        base.__name__ == name and base.__module__.partition(".")[0] == package
        for base in inspect.getmro(optimizer_class)
    )


def is_schedule_free(optimizer: Any) -> bool:
    """Return whether an optimizer or optimizer class is schedule-free, with separate modes for training and
    evaluation."""
    inner = optimizer if inspect.isclass(optimizer) else _unwrap(optimizer)
    return callable(getattr(inner, "train", None)) and callable(getattr(inner, "eval", None))


def sets_own_rate(optimizer_class: Any, arguments: Mapping[str, Any]) -> bool:
    """Return whether this is Adafactor with relative_step, which computes its own learning rate."""
    return comes_from(optimizer_class, "transformers", "Adafactor") and bool(arguments.get("relative_step"))


def for_training(optimizer: torch.optim.Optimizer) -> None:
    """Switch a schedule-free optimizer to training mode; no effect on others."""
    if is_schedule_free(optimizer):
        _unwrap(optimizer).train()


@contextmanager
def for_saving(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Switch a schedule-free optimizer to evaluation mode inside, for saving, previews and evaluation.

    Afterwards the parameters are restored bit for bit from a copy, since switching back rounds, and a run with previews
    would differ from one without. Other optimizers need no copy.
    """
    if not is_schedule_free(optimizer):
        yield
        return
    inner = _unwrap(optimizer)
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    modes = [group.get("train_mode") for group in inner.param_groups]
    kept = [parameter.detach().clone() for parameter in parameters]
    inner.eval()
    try:
        yield
    finally:
        inner.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
        for group, mode in zip(inner.param_groups, modes, strict=True):
            if mode is not None:
                group["train_mode"] = mode


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer can skip a step by a value on the device, as torch's fused ones do for a gradient
    scaler; stepping one weight at a time counts steps on its own."""
    inner = _unwrap(optimizer)
    return bool(getattr(inner, "_step_supports_amp_scaling", False)) and not hasattr(inner, "step_contexts")


@contextmanager
def skipping(optimizer: torch.optim.Optimizer, skipped: Tensor) -> Iterator[None]:
    """Have steps inside leave weights and states unchanged if `skipped`, () float32 on the device, is 1 and not 0.
    Python does not learn which."""
    inner = _unwrap(optimizer)
    inner.found_inf = skipped
    try:
        yield
    finally:
        del inner.found_inf


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the effective learning rates for the log: `lr`, and `lr/d*lr` if the optimizer adapts a factor d
    (Prodigy).

    With several parameter groups each name ends in the group's `name` or index. Call this after the optimizer's step
    and before the schedule's to get the rate of that step, including the warmup of a schedule-free optimizer.
    """
    inner = _unwrap(optimizer)
    rates: dict[str, float] = {}
    for index, group in enumerate(inner.param_groups):
        suffix = f"/{group.get('name', index)}" if len(inner.param_groups) > 1 else ""
        rates[f"lr{suffix}"] = rate = _rate(inner, group)
        if "d" in group:
            rates[f"lr/d*lr{suffix}"] = float(group["d"]) * rate
    return rates


def portable_state(holder: Any) -> dict[str, Any]:
    """Return the state of an optimizer or schedule as values that torch loads without unpickling objects.

    Tensors are not copied. Raise TypeError for a value that cannot be saved.
    """
    state: dict[str, Any] = _portable(_unwrap(holder).state_dict(), "state")
    return state


def load_portable_state(holder: Any, state: Mapping[str, Any]) -> None:
    """Load what `portable_state` returned into a new optimizer or schedule of the same configuration, exact to the bit.

    Load a schedule's state after its optimizer's. The optimizer's own choice of kernels stays, whatever the state was
    computed with. Optimizers cast loaded states to the parameter's data type and move paged states to plain device
    memory; both are undone here.
    """
    inner = _unwrap(holder)
    if not isinstance(inner, torch.optim.Optimizer):
        inner.load_state_dict(dict(state))
        return
    inner.load_state_dict({**state, "param_groups": _with_own_kernels(inner, state["param_groups"])})
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    order = [index for group in state["param_groups"] for index in group["params"]]
    for index, parameter in zip(order, parameters, strict=True):
        held = inner.state.get(parameter, {})
        for name, value in state["state"].get(index, {}).items():
            if isinstance(value, Tensor) and isinstance(held.get(name), Tensor) and held[name].dtype != value.dtype:
                held[name] = value.to(held[name].device, copy=True)
        if getattr(inner, "is_paged", False) and parameter.device.type != "cpu":
            _page(inner, parameter, held)


def _with_own_kernels(optimizer: torch.optim.Optimizer, saved: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return saved parameter groups with the choice of kernels of the optimizer's."""
    groups = zip(saved, optimizer.param_groups, strict=True)
    return [group | {name: own[name] for name in KERNEL_CHOICES if name in own} for group, own in groups]


@dataclass(frozen=True)
class Portable:
    """An optimizer or schedule whose `state_dict` and `load_state_dict` use `portable_state` and
    `load_portable_state`."""

    holder: Any

    def state_dict(self) -> dict[str, Any]:
        return portable_state(self.holder)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_portable_state(self.holder, state)


def _page(optimizer: Any, parameter: Tensor, held: dict[str, Any]) -> None:
    """Move the large states of a paged bitsandbytes optimizer back to pageable memory."""
    for name in ("state1", "state2"):
        if isinstance(held.get(name), Tensor):
            buffer = optimizer.get_state_buffer(parameter, dtype=held[name].dtype)
            held[name] = buffer.copy_(held[name])


def _rate(optimizer: Any, group: dict[str, Any]) -> float:
    if sets_own_rate(type(optimizer), group):
        state = optimizer.state.get(group["params"][0])
        return float(optimizer._get_lr(group, state)) if state else 0.0  # it has no rate before its first step
    return float(group.get("scheduled_lr") or group["lr"])


def _portable(value: Any, location: str) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if value is None or type(value) in (bool, int, float, complex, str):
        return value
    if isinstance(value, Mapping):
        return {_portable(key, location): _portable(found, f"{location}.{key}") for key, found in value.items()}
    if isinstance(value, tuple):
        return tuple(_portable(found, location) for found in value)
    if isinstance(value, list | set | frozenset):
        return [_portable(found, location) for found in value]
    if isinstance(value, bool | int | float | str):  # enumerations, and numpy's numbers
        base = next(kind for kind in (bool, int, float, str) if isinstance(value, kind))
        return base(value)
    if callable(getattr(value, "item", None)) and not getattr(value, "shape", ()):
        return value.item()
    raise TypeError(f"{location} is a {type(value).__name__}, which a saved state cannot hold")


def _unwrap(optimizer: Any) -> Any:
    """Return the optimizer without the wrappers of accelerate or deepspeed; a schedule is returned unchanged."""
    inner = getattr(optimizer, "optimizer", None)
    wrapped = isinstance(optimizer, torch.optim.Optimizer) and isinstance(inner, torch.optim.Optimizer)
    return _unwrap(inner) if wrapped else optimizer
