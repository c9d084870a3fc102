"""The feed-forward a part of the tokens at a time, since nothing in a block is wider.

Hidden activations are 2.7 times as wide as a token in the 14B model and 5.8 times in the 1.3B, and a backward pass
needs them before and after the GELU.

Legend: B batch, L tokens, d the width of a token.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Forward = Callable[[Tensor], Tensor]


def apply_chunks(blocks: Iterable[nn.Module], count: int) -> None:
    """Let the `ffn` (B, L, d) -> (B, L, d) of each block take its tokens in `count` parts; 1 changes nothing.

    Each token's numbers are what they were, but for the rounding of products of fewer rows. Only L/count tokens have
    their hidden activations in memory at once. For a gradient each part is computed once more in its own backward
    pass: beside a recomputed block that makes three forward passes of the feed-forward in a step, not two.
    """
    if count == 1:
        return
    for block in blocks:
        ffn = cast(nn.Module, block.ffn)
        ffn.forward = _chunked(ffn.forward, count)


def _chunked(forward: Forward, count: int) -> Forward:
    @wraps(forward)
    def chunked(x: Tensor) -> Tensor:
        return torch.cat([_checkpointed(forward, part) for part in x.chunk(count, dim=1)], dim=1)

    return chunked


def _checkpointed(forward: Forward, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x)
    return cast(Tensor, checkpoint(forward, x, use_reentrant=False))
