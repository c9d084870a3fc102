"""Counting the bytes that a computation holds, whether its tensors have numbers or are on the meta device.

What operators return is counted from then until nothing holds it. What kernels take for themselves meanwhile is not
seen, and neither is what was there before: the weights.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wan_train.placement.lanes import HostLane

WORK, GRADIENTS, HOST = "work", "gradients", "CPU RAM"


class Ledger(TorchDispatchMode):
    """While entered: bytes `alive` by account, and the most that each had. Of WORK and GRADIENTS together `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.peak = 0
        self._accounts: dict[int, str] = {}
        self._account = WORK

    def leave_out(self, tensors: Iterator[Tensor]) -> None:
        """Do not count these, which are there already."""
        for tensor in tensors:
            self._accounts.setdefault(_key(tensor), "")

    @contextmanager
    def on(self, account: str) -> Iterator[None]:
        """What is made inside continues this account."""
        self._account, before = account, self._account
        yield
        self._account = before

    def move(self, tensor: Tensor, account: str) -> None:
        """Count this tensor there from now on."""
        key, size = _key(tensor), tensor.untyped_storage().nbytes()
        if key in self._accounts and self._accounts[key] != account:
            self._add(self._accounts[key], -size)
            self._accounts[key] = account
            self._add(account, size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := _key(leaf)) not in self._accounts:
                storage = leaf.untyped_storage()
                self._accounts[key] = self._account
                self._add(self._account, storage.nbytes())
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self._add(self._accounts.pop(key), -size)

    def _add(self, account: str, size: int) -> None:
        self.alive[account] += size
        self.most[account] = max(self.most[account], self.alive[account])
        self.peak = max(self.peak, self.alive[WORK] + self.alive[GRADIENTS])


class OutlineLane(HostLane):
    """To the meta device, from CPU RAM that is meta too and has an account of its own."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(torch.device("meta"))
        self._ledger = ledger

    def host(self, num_bytes: int) -> Tensor:
        with self._ledger.on(HOST):
            return torch.empty(num_bytes, dtype=torch.uint8, device="meta")


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
