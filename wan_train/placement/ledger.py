"""Count the bytes of tensors in a computation, on a real device or on the meta device.

Outputs of operators are counted until they are freed. Workspaces of kernels and tensors that existed before, the
weights, are not counted.
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
    """Dispatch mode that counts bytes by account: `alive` now, `most` ever, and the `peak` of WORK plus GRADIENTS."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.peak = 0
        self._accounts: dict[int, str] = {}
        self._account = WORK

    def leave_out(self, tensors: Iterator[Tensor]) -> None:
        """Exclude existing tensors from the count."""
        for tensor in tensors:
            self._accounts.setdefault(_key(tensor), "")

    @contextmanager
    def on(self, account: str) -> Iterator[None]:
        """Count tensors made within the context in this account."""
        self._account, before = account, self._account
        yield
        self._account = before

    def move(self, tensor: Tensor, account: str) -> None:
        """Count this tensor in a different account from now on."""
        key, size = _key(tensor), tensor.untyped_storage().nbytes()
        if key in self._accounts and self._accounts[key] != account:
            self._add(self._accounts[key], -size)
            self._accounts[key] = account
            self._add(account, size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _leaves_meta(func, args, kwargs or {}):
            with self.on(HOST):
                return torch.empty_like(args[0], dtype=kwargs.get("dtype"))
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


def _leaves_meta(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether a tensor on the meta device, which stands for the device, is copied to the CPU."""
    to_copy = torch.ops.aten._to_copy.default
    return func is to_copy and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type == "cpu"


class OutlineLane(HostLane):
    """A lane to the meta device, with host memory on the meta device too, counted in an account of its own."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(torch.device("meta"))
        self._ledger = ledger

    def host(self, num_bytes: int) -> Tensor:
        with self._ledger.on(HOST):
            return torch.empty(num_bytes, dtype=torch.uint8, device="meta")


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
