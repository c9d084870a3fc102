"""From latents to pixels."""

import numpy as np
import torch
from torch import Tensor

from wan_train.media_out import to_frames
from wan_train.models.settings import VaeSettings
from wan_train.models.vae import WanVAE, load_vae
from wan_train.precision import compute_dtype, dtype_of


def open_vae(settings: VaeSettings, device: torch.device) -> WanVAE:
    """The VAE as the settings want it."""
    vae = load_vae(settings.vae, device=device, dtype=compute_dtype(device, dtype_of(settings.vae_dtype)))
    vae.cache_on_cpu = settings.vae_cache_cpu
    return vae


def decode_frames(vae: WanVAE, latents: Tensor, device: torch.device) -> np.ndarray:
    """Frames (F, H, W, 3) uint8 of normalised latents (C, F', H', W')."""
    return to_frames(vae.decode(latents.unsqueeze(0).to(device))[0])
