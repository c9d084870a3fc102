"""Trading time for memory: activations of a block are computed again in the backward pass."""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from wan_train.cli import choose


def _keep(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward


def _recompute_all(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputed


MODES: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {"none": _keep, "full": _recompute_all}


def apply_recompute(blocks: Iterable[nn.Module], mode: str) -> None:
    """Let each block keep its activations ("none") or only its inputs ("full": one more forward pass of the block)."""
    wrap = choose("recompute mode", mode, MODES)
    for block in blocks:
        block.forward = wrap(block.forward)
