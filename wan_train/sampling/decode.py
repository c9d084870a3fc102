"""From latents to pixels."""

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


def open_vae(settings: VaeSettings, device: torch.device) -> WanVAE:
    """The VAE as the settings want it."""
    vae = load_vae(settings.vae, device=device, dtype=compute_dtype(device, dtype_of(settings.vae_dtype)))
    return set_up(vae, settings)


def set_up(vae: WanVAE, settings: VaeSettings) -> WanVAE:
    """A loaded VAE, told where to keep its frame cache and whether to work in tiles."""
    vae.cache_on_cpu = settings.vae_cache_cpu
    vae.tiling = Tiling(settings.vae_tile_size, settings.vae_tile_overlap) if settings.vae_tiling else None
    return vae


def decode_frames(vae: WanVAE, latents: Tensor, device: torch.device) -> np.ndarray:
    """Frames (F, H, W, 3) uint8 of normalised latents (C, F', H', W').

    Where the device's memory does not do for whole frames, tiles of them are decoded: a warning tells of it, since the
    result differs a little.
    """
    batch = latents.unsqueeze(0).to(device)
    try:
        return to_frames(vae.decode(batch)[0])
    except torch.OutOfMemoryError:
        if vae.tiling is not None:
            raise
    release_memory()
    log.warning("decoding takes more memory than %s has: going on in tiles, as --vae_tiling does", device)
    vae.tiling = Tiling()
    try:
        return to_frames(vae.decode(batch)[0])
    finally:
        vae.tiling = None
