"""Inputs of control models: latents of a control video, a start image and a reference image (VideoX-Fun), and the
conversion of conditions to the arguments of `Dit.forward`.

Pixels are made contiguous before encoding, because convolutions in other memory layouts differ in the last bits.

Legend: B batch, C channels of latents, F latent frames, H W latent size, N pixel frames, X Y pixel height and width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from wan_train.conditions.camera import packed, plucker
from wan_train.conditions.images import Encode
from wan_train.conditions.kinds import CAMERA, CONTROL_LATENTS, IMAGE_LATENTS, KINDS, START_LATENTS
from wan_train.models.variants import FRAME_STEP, Variant
from wan_train.placement.transfers import send

CPU = torch.device("cpu")


def start_latents(image: Tensor, encode: Encode) -> Tensor:
    """Return `start_latents` (C, 1, H, W), on the CPU, of a video's first frame (3, X, Y) in [-1, 1]."""
    return encode(image[None, :, None].contiguous())[0].cpu()


def reference_latents(image: Tensor, encode: Encode) -> Tensor:
    """Return `reference_latents` (C, 1, H, W), on the CPU, of an image (3, X, Y) in [-1, 1] of the video's size."""
    return encode(image[None, :, None].contiguous())[0].cpu()


def control_latents(pixels: Tensor, encode: Encode) -> Tensor:
    """Return `control_latents` (C, F, H, W), on the CPU, of a control video (3, N, X, Y) in [-1, 1]."""
    return encode(pixels[None].contiguous())[0].cpu()


def dit_arguments(
    extras: Mapping[str, Tensor],
    variant: Variant,
    shape: tuple[int, int, int, int, int],
    *,
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Convert conditions, by name, in CPU RAM and with a batch dimension, to keyword arguments of `Dit.forward` on a
    device; shared ones stay where they are.

    `shape` (B, C, F, H, W) is that of the video's latents. The channels that a control model concatenates to the noisy
    latents become one tensor, zeros for absent parts (VideoX-Fun): the latents of the control video, then those of the
    start image, zero after its frame, or in Wan2.2 the channels of image-to-video models. Camera entries become a
    packed Pluecker map.
    """
    control = variant.control
    near = {
        name: value if KINDS[name].is_shared or name == CAMERA else send(value, device)
        for name, value in extras.items()
    }
    if control is None or control.vace:
        return near
    parts = {CONTROL_LATENTS, START_LATENTS, IMAGE_LATENTS}
    arguments = {name: value for name, value in near.items() if name not in parts}
    behind = [_start_part(near, variant, shape, device)]
    if control.video:
        behind.insert(0, _or_zeros(near.get(CONTROL_LATENTS), shape, device))
    like = next((near[name] for name in (CONTROL_LATENTS, START_LATENTS, IMAGE_LATENTS) if name in near), behind[0])
    arguments[IMAGE_LATENTS] = torch.cat([part.to(like) for part in behind], dim=1)
    if CAMERA in extras:
        size = shape[3] * variant.space.stride, shape[4] * variant.space.stride
        maps = [packed(plucker(entries, *size, device=device)) for entries in extras[CAMERA]]
        arguments[CAMERA] = torch.stack(maps)
    return arguments


def _start_part(
    extras: Mapping[str, Tensor], variant: Variant, shape: tuple[int, int, int, int, int], device: torch.device
) -> Tensor:
    """Return the start image's channels (B, C, F, H, W), or (B, 4+C, F, H, W) with I2V's mask."""
    batch, channels, frames, height, width = shape
    assert variant.images is not None
    if not variant.images.alone:
        return _or_zeros(extras.get(IMAGE_LATENTS), (batch, FRAME_STEP + channels, frames, height, width), device)
    start = _or_zeros(extras.get(START_LATENTS), (batch, channels, 1, height, width), device)
    return torch.cat([start, start.new_zeros(batch, channels, frames - 1, height, width)], dim=2)


def _or_zeros(value: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.zeros(shape, device=device) if value is None else value
