"""Encoding what does not fit into the device's memory: fewer clips at once, then smaller tiles."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from wan_train.errors import RunError
from wan_train.log import get_logger
from wan_train.models.vae.tiling import Tiling

logger = get_logger(__name__)

Task = TypeVar("Task")


def encode_fitting(
    vae: Any, batch: Sequence[Task], encode: Callable[[Sequence[Task]], None], *, name: Callable[[Task], str]
) -> None:
    """`encode(batch)`; out of memory, one clip after another, and a clip that does not fit alone in ever smaller tiles.

    `vae.tiling` is the same afterwards. Each retry is a warning that names the clip. Raises RunError for a clip that
    fits in no way.
    """
    if _fits(encode, batch):
        return
    if len(batch) > 1:
        logger.warning(
            "out of memory with a batch of %d clips (%s ...): encoding one at a time", len(batch), name(batch[0])
        )
        for one in batch:
            encode_fitting(vae, [one], encode, name=name)
        return
    (one,) = batch
    before: Tiling | None = vae.tiling
    try:
        while tiling := _smaller(vae.tiling):
            logger.warning("out of memory with %s: encoding in tiles of %d latent pixels", name(one), tiling.size)
            vae.tiling = tiling
            if _fits(encode, batch):
                return
    finally:
        vae.tiling = before
    raise RunError(
        f"{name(one)} does not fit into the device's memory, not even in tiles: free some of it, or take"
        " --vae_cache_cpu, a smaller resolution or fewer frames; what is cached is kept"
    )


def _fits(encode: Callable[[Sequence[Task]], None], batch: Sequence[Task]) -> bool:
    try:
        encode(batch)
        return True
    except RuntimeError as problem:
        # A CPU has no error class of its own for this.
        if not isinstance(problem, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(problem):
            raise
    # Only here, where the error no longer holds the tensors of the failed call, can their memory be given back.
    torch.cuda.empty_cache()
    return False


def _smaller(tiling: Tiling | None) -> Tiling | None:
    """The tiles to try next, or None where smaller ones would hardly save anything or spoil the result."""
    if tiling is None:
        return Tiling()
    half = tiling.size // 2
    return replace(tiling, size=half) if half > max(tiling.overlap, 8) else None
