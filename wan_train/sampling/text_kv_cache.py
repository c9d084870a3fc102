"""What blocks make of a text, kept from one step of a run to the next: the text does not change, only the video does.

For an image of 256 x 256 the keys and values of 512 text tokens are a fifth of a pass, for a long video next to
nothing; they are kept where they are worth their memory, 2 * 512 * width numbers for each block and text.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from wan_train.compile import is_compiled
from wan_train.models.dit.dit import Dit
from wan_train.models.stacks import all_blocks
from wan_train.models.variants import TEXT_LENGTH

MOST_TOKENS = 8 * TEXT_LENGTH  # of a video; beyond that less than a fiftieth of a pass would be saved

Read = Callable[[Tensor], tuple[Tensor, ...]]


@contextmanager
def caching_text_kv(model: nn.Module, num_tokens: int) -> Iterator[None]:
    """While this is entered, let the blocks keep their keys and values of every text that they see.

    They know a text by its tensor: `Dit.embed_context` has to have made it once. `num_tokens` are those of the video;
    nothing is kept for long ones, nor by compiled blocks, which would be compiled anew.
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
            known[id(source)] = (source, read(source))  # the source is held, so that its id stays its own
        return known[id(source)][1]

    return look_up
