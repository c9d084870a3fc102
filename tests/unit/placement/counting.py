"""What a run does and holds: the operators that it calls, and the bytes that are alive."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """While entered: `calls` by operator, and `live()` and `peak` bytes of what has been made since."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.calls[func.name()] += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta and _key(leaf) not in known:
                storage = leaf.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.live())
        return result

    def live(self) -> int:
        self.storages = {key: found for key, found in self.storages.items() if not found[0].expired()}
        return sum(size for _, size in self.storages.values())

    @property
    def attentions(self) -> int:
        return sum(
            count for name, count in self.calls.items() if "scaled_dot_product" in name and "backward" not in name
        )


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-5) -> bool:
    """Apart by no more than that part of the largest number of each tensor."""
    pairs = list(zip(ours, theirs, strict=True))
    return all(float((a - b).abs().max()) <= tolerance * float(b.abs().max()) for a, b in pairs)
