"""Exchange Python objects within a group of processes."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from wan_train.distributed.groups import Split

Value = TypeVar("Value")


def made_by_first(split: Split, make: Callable[[], Value]) -> Value:
    """Return the result of `make` on the first process of `split`, broadcast to all of them, in host memory."""
    if split.size == 1:
        return make()
    box = [make() if split.rank == 0 else None]
    dist.broadcast_object_list(box, group=split.group, group_src=0)
    made: Value = box[0]  # type: ignore[assignment]
    return made


def from_all(split: Split, value: Value) -> list[Value]:
    """Gather the values of all processes of `split`, in rank order."""
    if split.size == 1:
        return [value]
    values: list[Value] = [value] * split.size
    dist.all_gather_object(values, value, group=split.group)
    return values
