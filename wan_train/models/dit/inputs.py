"""Inputs of the DiT other than latents, timestep and context."""

from dataclasses import dataclass

from torch import Tensor

from wan_train.models.dit.layers import DitConfig
from wan_train.models.dit.rope import Riflex


@dataclass(frozen=True)
class Inputs:
    """Inputs other than latents, timestep and context: the keyword arguments of `Dit.forward`."""

    image_latents: Tensor | None = None
    clip_features: Tensor | None = None
    reference_latents: Tensor | None = None
    camera: Tensor | None = None
    vace_context: Tensor | None = None
    vace_scale: float = 1.0
    motion_bucket_id: Tensor | None = None
    frame_positions: Tensor | None = None
    riflex: Riflex | None = None


NO_INPUTS = Inputs()


def check_inputs(inputs: Inputs, config: DitConfig, num_channels: int) -> None:
    """Raise ValueError for an input that the model has no weights for, or a required one that is missing.

    `num_channels` is the number of channels of the noisy latents.
    """
    has_weights = {
        "image_latents": config.in_dim != num_channels,
        "reference_latents": config.reference,
        "camera": bool(config.camera_dim),
        "vace_context": bool(config.vace_layers),
        "motion_bucket_id": config.motion,
    }
    for name, has in has_weights.items():
        if getattr(inputs, name) is not None and not has:
            raise ValueError(f"this model has no weights for {name}")
    if config.camera_dim and inputs.camera is None:
        raise ValueError("this model requires a camera map")
