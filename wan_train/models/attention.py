"""Attention backends, by name.

Legend: B batch, L and S tokens, N heads, D head width.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from wan_train.cli import choose

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v by torch's own kernels. query (B,L,N,D), key and value (B,S,N,D) -> (B,L,N,D)."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


BACKENDS: dict[str, Attend] = {"torch": attend_torch, "sdpa": attend_torch}


def attention(name: str) -> Attend:
    """The backend called `name`; an unknown name is an InputError that lists the known ones."""
    return choose("attention backend", name, BACKENDS)
