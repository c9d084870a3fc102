"""Encode clips that do not fit into device memory: smaller batches first, then smaller tiles."""

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
    """Run `encode(batch)`; when out of memory, retry clip by clip, and a clip that does not fit alone with ever smaller
    tiles.

    `vae.tiling` is restored afterwards. Each retry logs a warning that names the clip. Raises RunError for a clip that
    does not fit at all.
    """
    if _fits(encode, batch):
        return
    if len(batch) > 1:
        logger.warning(
            "out of memory with %d clips per batch (%s ...): retrying with one at a time", len(batch), name(batch[0])
        )
        for one in batch:
            encode_fitting(vae, [one], encode, name=name)
        return
    (one,) = batch
    before: Tiling | None = vae.tiling
    try:
        while tiling := _smaller(vae.tiling):
            logger.warning("out of memory with %s: retrying with tiles of %d latent cells", name(one), tiling.size)
            vae.tiling = tiling
            if _fits(encode, batch):
                return
    finally:
        vae.tiling = before
    raise RunError(
        f"not enough device memory to encode {name(one)}, even with tiling: free some, or use"
        " --vae_cache_cpu, a lower resolution or fewer frames; finished caches are kept"
    )


def _fits(encode: Callable[[Sequence[Task]], None], batch: Sequence[Task]) -> bool:
    try:
        encode(batch)
        return True
    except RuntimeError as problem:
        # PyTorch has no error class for this on the CPU.
        if not isinstance(problem, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(problem):
            raise
    # Only here, where the exception no longer references the tensors of the failed call, can their memory be freed.
    torch.cuda.empty_cache()
    return False


def _smaller(tiling: Tiling | None) -> Tiling | None:
    """Return the next tiling to try, or None if smaller tiles would save little memory or degrade the result."""
    if tiling is None:
        return Tiling()
    half = tiling.size // 2
    return replace(tiling, size=half) if half > max(tiling.overlap, 8) else None
