"""accelerate, set up so that precision is ours: it launches, places and synchronises."""

import logging
import random

from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, broadcast_object_list

from wan_train.training.settings import LoopSettings

# Whoever imports bitsandbytes without a GPU, accelerate too, is warned of a 4-bit kernel that nobody here asks for.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def make_accelerator(loop: LoopSettings) -> Accelerator:
    """The accelerator of this process. Autocast stays off: the model itself says what it computes in."""
    return Accelerator(mixed_precision=loop.mixed_precision, kwargs_handlers=[AutocastKwargs(enabled=False)])


def agree_on_seed(seed: int | None) -> int:
    """The given seed, or one drawn by the first process for all of them."""
    if seed is not None:
        return seed
    drawn = [random.SystemRandom().randrange(2**32)]
    broadcast_object_list(drawn)
    return int(drawn[0])
