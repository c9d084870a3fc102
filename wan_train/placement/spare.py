"""Skip the last matrix product of a block when it is recomputed.

The backward pass needs only the tensors that a block's operators have saved. The output of the second feed-forward
matrix is added to the residual stream and saved by no operator, but its product is a third of the work of
recomputation. It is therefore skipped and replaced by NaN, so that any accidental use shows in the loss.
"""

from contextvars import ContextVar
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Matrix product operators, and the index of the first of their two matrix arguments.
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::_int_mm": 0, "aten::_scaled_mm": 0}

_leaving_out: ContextVar[bool] = ContextVar("whether the current block's last product is skipped", default=False)


class _NoProducts(TorchDispatchMode):
    """Replace matrix products by NaN of the right shape. Autograd, above dispatch, records them as usual."""

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
    """Return an operator's positional arguments by name.

    Dispatch passes arguments by position if the schema allows, regardless of how the caller passed them.
    """
    return {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}


class LeavingOut:
    """Context of a block's recomputation; skips its last product if it is `spare`."""

    def __init__(self, *, spare: bool) -> None:
        self._spare = spare

    def __enter__(self) -> None:
        self._token = _leaving_out.set(self._spare)

    def __exit__(self, *_: object) -> None:
        _leaving_out.reset(self._token)


def is_spare(block: nn.Module, shared: tuple[Any, ...]) -> bool:
    """Return whether no operator saves the last product.

    That is the case if the tensors it is multiplied with, the block's own parameters and the arguments shared by all
    blocks, require no gradient.
    """
    own = any(parameter.requires_grad for parameter in block.parameters(recurse=False))
    return not own and not any(isinstance(value, Tensor) and value.requires_grad for value in shared)


def mark_last_product(block: nn.Module) -> None:
    """Make the last Linear of the block's `ffn`, if the block ends with it, skippable by `LeavingOut`."""
    ffn = getattr(block, "ffn", None) if getattr(block, "ends_with_ffn", True) else None
    last = ffn[-1] if isinstance(ffn, nn.Sequential) else None
    if not isinstance(last, nn.Linear):
        return
    forward = last.forward

    @wraps(forward)
    def forward_or_skip(x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not _leaving_out.get():
            return forward(x)
        with _NoProducts():  # type: ignore[no-untyped-call]
            return forward(x)

    cast(Any, last).forward = forward_or_skip
