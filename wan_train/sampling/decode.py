"""Decode latents to frames."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from wan_train.log import get_logger
from wan_train.media_out import to_frames
from wan_train.models.settings import VaeSettings
from wan_train.models.vae.tiling import Tiling
from wan_train.models.vae.vae import WanVAE, load_vae
from wan_train.placement.report import release_memory
from wan_train.precision import compute_dtype, dtype_of

log = get_logger(__name__)

# After three chunks (1 + 4 + 4 frames) the frame caches of all layers are full, so memory use stays constant.
STEADY = 3


def open_vae(settings: VaeSettings, device: torch.device) -> WanVAE:
    """Load the VAE and apply the settings."""
    vae = load_vae(settings.vae, device=device, dtype=compute_dtype(device, dtype_of(settings.vae_dtype)))
    return set_up(vae, settings)


def set_up(vae: WanVAE, settings: VaeSettings) -> WanVAE:
    """Apply the settings of frame cache and tiling to a loaded VAE, and return it."""
    vae.cache_on_cpu = settings.vae_cache_cpu
    vae.tiling = Tiling(settings.vae_tile_size, settings.vae_tile_overlap) if settings.vae_tiling else None
    return vae


def decode_frames(vae: WanVAE, latents: Tensor, device: torch.device) -> Iterator[np.ndarray]:
    """Yield frames (H, W, 3) uint8 of normalised latents (C, F', H', W'), decoded lazily.

    If the device runs out of memory, the VAE decodes in tiles instead, with a warning because the result differs
    slightly. If several processes decode strips, only the first yields frames, and there are no tiles.
    """
    batch = latents.unsqueeze(0).to(device)
    chunks = vae.decode_chunks(batch)
    if vae.strips is not None:
        yield from _frames(chunks)
        return
    try:
        first = list(itertools.islice(chunks, STEADY))
    except torch.OutOfMemoryError:
        if vae.tiling is not None:
            raise
        first = []
    if first:
        yield from _frames(first)
        del first
        yield from _frames(chunks)
        return
    del chunks
    release_memory()
    log.warning("not enough memory on %s to decode whole frames: decoding in tiles, as with --vae_tiling", device)
    vae.tiling = Tiling()
    try:
        yield from _frames(vae.decode_chunks(batch))
    finally:
        vae.tiling = None


def _frames(chunks: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Yield frames (H, W, 3) uint8 of chunks of pixels (1, 3, f, H, W)."""
    for chunk in chunks:
        yield from to_frames(chunk[0])
