"""Leaving out, when a block is recomputed, the product that nothing needs.

The backward pass wants what the operators of a block have saved. The last product, of the feed-forward's second
matrix, is only added to the residual stream: no operator saves its result, and when the block is recomputed it is a
third of the work. So then it is not taken, and NaN stands in its place: should anything read it all the same, the loss
shows it.
"""

from contextvars import ContextVar
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# The operators that multiply matrices, and which of their arguments are the two.
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::_int_mm": 0, "aten::_scaled_mm": 0}

_leaving_out: ContextVar[bool] = ContextVar("whether the last product of the block at work is left out", default=False)


class _NoProducts(TorchDispatchMode):
    """Matrix products give NaN of the right shape. Autograd, which is above, records them as ever."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = PRODUCTS.get(func.name().partition(".")[0])
        if first is None:
            return func(*args, **(kwargs or {}))
        left, right = args[first : first + 2]
        given = _by_name(func, args) | (kwargs or {})
        dtype = given.get("out_dtype") or (torch.int32 if left.dtype is torch.int8 else left.dtype)
        shape = (left.shape[0], right.shape[1])
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype, device=left.device)
        return torch.full(shape, torch.nan, dtype=dtype, device=left.device)


def _by_name(func: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """An operator's positional arguments by their names: dispatch hands on by position what its schema lets come so,
    however the caller gave it."""
    return {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}


class LeavingOut:
    """A second pass of a block, without its last product if it is `spare`. A context manager."""

    def __init__(self, *, spare: bool) -> None:
        self._spare = spare

    def __enter__(self) -> None:
        self._token = _leaving_out.set(self._spare)

    def __exit__(self, *_: object) -> None:
        _leaving_out.reset(self._token)


def is_spare(block: nn.Module, shared: tuple[Any, ...]) -> bool:
    """Whether nothing saves the last product: what it is multiplied with, the block's own parameters and the arguments
    that all blocks share, needs no gradient."""
    own = any(parameter.requires_grad for parameter in block.parameters(recurse=False))
    return not own and not any(isinstance(value, Tensor) and value.requires_grad for value in shared)


def mark_last_product(block: nn.Module) -> None:
    """Let the last Linear of the block's `ffn`, if it has one and ends with it, heed `LeavingOut`."""
    ffn = getattr(block, "ffn", None) if getattr(block, "ends_with_ffn", True) else None
    last = ffn[-1] if isinstance(ffn, nn.Sequential) else None
    if not isinstance(last, nn.Linear):
        return
    forward = last.forward

    @wraps(forward)
    def heeding(x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not _leaving_out.get():
            return forward(x)
        with _NoProducts():  # type: ignore[no-untyped-call]
            return forward(x)

    cast(Any, last).forward = heeding
