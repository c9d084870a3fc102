"""Cache the cross-attention keys and values of texts between the steps of a run, in which only the video changes.

For an image of 256 x 256 the keys and values of 512 text tokens are a fifth of a pass, for a long video next to
nothing. They are cached only where that is worth the memory, 2 * 512 * width elements per block and text.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from wan_train.compile import is_compiled
from wan_train.models.dit.dit import Dit
from wan_train.models.stacks import all_blocks
from wan_train.models.variants import TEXT_LENGTH

MOST_TOKENS = 8 * TEXT_LENGTH  # of a video; with more, less than a fiftieth of a pass would be saved

Read = Callable[[Tensor], tuple[Tensor, ...]]


@contextmanager
def caching_text_kv(model: nn.Module, num_tokens: int) -> Iterator[None]:
    """Cache each block's keys and values of every text inside the context.

    A text is identified by its tensor, which `Dit.embed_context` must have created once. `num_tokens` is that of the
    video; nothing is cached for long videos, or by compiled blocks, which would be recompiled.
    """
    blocks: Iterable[Any] = all_blocks(model) if isinstance(model, Dit) and num_tokens <= MOST_TOKENS else ()
    attentions = [block.cross_attn for block in blocks if not is_compiled(block)]
    for attention in attentions:
        attention.read = _cached(attention.read)
    try:
        yield
    finally:
        for attention in attentions:
            del attention.read


def _cached(read: Read) -> Read:
    known: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}

    def look_up(source: Tensor) -> tuple[Tensor, ...]:
        if id(source) not in known:
            known[id(source)] = (source, read(source))  # holding the source keeps its id unique
        return known[id(source)][1]

    return look_up
