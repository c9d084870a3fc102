"""What one process has made, for all of a group."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from wan_train.distributed.groups import Split

Value = TypeVar("Value")


def made_by_first(split: Split, make: Callable[[], Value]) -> Value:
    """What `make` returns on the first process of `split`, on all of them: they have a copy each, in host memory."""
    if split.size == 1:
        return make()
    box = [make() if split.rank == 0 else None]
    dist.broadcast_object_list(box, group=split.group, group_src=0)
    made: Value = box[0]  # type: ignore[assignment]
    return made


def from_all(split: Split, value: Value) -> list[Value]:
    """The values of all processes of `split`, in the order of their ranks."""
    if split.size == 1:
        return [value]
    values: list[Value] = [value] * split.size
    dist.all_gather_object(values, value, group=split.group)
    return values
