"""From latents to pixels."""

import numpy as np
import torch
from torch import Tensor

from wan_train.media_out import to_frames
from wan_train.models.settings import VaeSettings
from wan_train.models.vae import WanVAE, load_vae
from wan_train.models.vae_tiling import Tiling
from wan_train.precision import compute_dtype, dtype_of


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
    """Frames (F, H, W, 3) uint8 of normalised latents (C, F', H', W')."""
    return to_frames(vae.decode(latents.unsqueeze(0).to(device))[0])
