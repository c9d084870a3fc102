"""Count what a program asks of a GPU that is not there: its tensors are on the meta device, where nothing is computed.

A dispatch mode sees every operator below autograd, each of which is one kernel on a GPU, or several in a few cases
(reductions, sorts). Views and allocations launch none.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Allocations and views that are not marked as views of their input.
WITHOUT_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach")
OVERWRITING = ("copy_", "fill_", "zero_")  # operators that do not read their first argument
WAITING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")  # the host needs their result
ATTENTION = "_scaled_dot_product_flash_attention"


@dataclass(frozen=True)
class Rates:
    """Speeds of a device in FLOP/s, bytes/s and seconds per kernel launch; default: what an H200 reaches."""

    products: float = 790e12  # bfloat16
    products_float32: float = 60e12
    attention: float = 600e12
    attention_backward: float = 480e12
    memory: float = 4.3e12
    launch: float = 4e-6

    def seconds(self, section: str, flops: int, num_bytes: int, *, float32: bool) -> float:
        """Return the time of one kernel: that of its FLOPs or of its memory traffic, whichever is longer."""
        speed = {
            "attention": self.attention,
            "attention backward": self.attention_backward,
        }.get(section, self.products_float32 if float32 else self.products)
        return max(flops / speed, num_bytes / self.memory) + self.launch


@dataclass
class Counts:
    """What was asked of the device: `seconds` by section, the rest in total.

    Sections are `products`, `attention`, `attention backward` and `elementwise`, which is everything else;
    `elementwise_bytes` are read or written by the latter. `copies` are from host to device, `waits` are points where
    the host needs a result of the device.
    """

    seconds: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    elementwise_bytes: int = 0
    kernels: int = 0
    copies: int = 0
    waits: int = 0
    bytes_by_operator: Counter[str] = field(default_factory=Counter)

    @property
    def total_seconds(self) -> float:
        """The sum of all sections."""
        return sum(self.seconds.values())


class Counting(TorchDispatchMode):
    """Count the operators within this context in `counts`."""

    def __init__(self, rates: Rates = Rates()) -> None:
        super().__init__()
        self.counts = Counts()
        self.rates = rates
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        inputs = _tensors((args, {key: value for key, value in kwargs.items() if key != "out"}))
        if name in WAITING and any(x.is_meta for x in inputs):
            self.counts.waits += 1
        if name == "_local_scalar_dense" and inputs[0].is_meta:
            return 0.0
        out = func(*args, **kwargs)
        if self._paused or func.is_view or name in WITHOUT_KERNEL:
            return out
        outputs = _tensors(out)
        if not any(x.is_meta for x in outputs):
            return out
        if any(not x.is_meta and x.ndim for x in inputs):
            self.counts.copies += 1
        read = inputs[1:] if name in OVERWRITING else inputs
        self._add(name, read, outputs, _flops(func, args, kwargs, out))
        return out

    def as_one_kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, counted as one kernel that reads its inputs and writes its outputs."""

        def counted(*args: Any) -> Any:
            with self._pause():
                out = function(*args)
            self._add(getattr(function, "__name__", "fused"), _tensors(args), _tensors(out), 0)
            return out

        return counted

    def _add(self, name: str, inputs: list[Tensor], outputs: list[Tensor], flops: int) -> None:
        section = "products" if flops else "elementwise"
        if name.startswith(ATTENTION):
            section = "attention backward" if name.endswith("backward") else "attention"
        num_bytes = sum(_bytes(x) for x in (*inputs, *outputs))
        float32 = any(x.dtype is torch.float32 for x in inputs)
        self.counts.seconds[section] += self.rates.seconds(section, flops, num_bytes, float32=float32)
        self.counts.flops += flops
        self.counts.kernels += 1
        if section == "elementwise":
            self.counts.elementwise_bytes += num_bytes
            self.counts.bytes_by_operator[name] += num_bytes

    @contextmanager
    def _pause(self) -> Iterator[None]:
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before


@contextmanager
def flash_attention() -> Iterator[None]:
    """Use the operator of FlashAttention within the context, which torch would select on a GPU for half precision."""
    plain = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the FLOPs of a product, in place or not, or of attention; 0 for other operators."""
    packet = func._overloadpacket
    count = flop_registry.get(getattr(torch.ops.aten, packet.__name__.removesuffix("_"), packet))
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(x: Tensor) -> int:
    """Return the bytes of a tensor in memory: dimensions that it is expanded along count once."""
    elements = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements
