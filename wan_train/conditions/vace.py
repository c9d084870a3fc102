"""The VACE context: inactive (kept) and reactive (generated) latents of a video, their mask, and reference images
(official Wan2.1 VACE; Jiang et al. 2025, section 3.2).

Legend: B batch, C channels of latents, F latent frames, H W latent size, N pixel frames, X Y pixel height and width,
R reference images.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from wan_train.conditions.images import Encode
from wan_train.models.variants import FRAME_STEP, LATENT_CHANNELS, VAE_STRIDE

MASK_CHANNELS = VAE_STRIDE**2
CONTEXT_CHANNELS = 2 * LATENT_CHANNELS + MASK_CHANNELS
_THRESHOLD = 0.5  # of a mask in [0, 1]: above it is generated
_WHITE = 1.0


def vace_context(
    video: Tensor | None,
    mask: Tensor | None,
    references: Sequence[Tensor],
    encode: Encode,
    *,
    shape: tuple[int, int, int],
) -> Tensor:
    """Return `vace_context` (96, R+F, H, W) of a video of `shape` (N, X, Y), on the CPU.

    `video` is (3, N, X, Y) in [-1, 1], grey if None; `mask` is (N, X, Y) in [0, 1], generated above 0.5, and everything
    if None or without a video. `references` (3, x, y) in [-1, 1], of any size, are letterboxed on white. The channels
    are the inactive latents, the reactive latents and the packed mask; references come first, as inactive frames.
    """
    if video is None:
        video, mask = torch.zeros(3, *shape), None
    video = video.contiguous()  # convolutions in other memory layouts differ in the last bits
    made = torch.ones(shape) if mask is None else (mask > _THRESHOLD).float()
    made = made.to(video.device)
    kept_latents, made_latents = (encode((video * part)[None])[0].cpu() for part in (1 - made, made))
    context = torch.cat([kept_latents, made_latents, packed_mask(made.cpu()).to(kept_latents)])
    before = [encode(letterboxed(image, *shape[1:])[None, :, None].contiguous())[0].cpu() for image in references]
    absent = CONTEXT_CHANNELS - LATENT_CHANNELS
    return torch.cat([*(F.pad(latents, (0, 0, 0, 0, 0, 0, 0, absent)) for latents in before), context], dim=1)


def packed_mask(mask: Tensor) -> Tensor:
    """Pack a mask (N, X, Y) into channels (64, F, H, W), the 8 x 8 pixels of each latent cell, row by row.

    Frames are selected by nearest-exact interpolation over time.
    """
    cells = rearrange(mask, "N (H a) (W b) -> (a b) N H W", a=VAE_STRIDE, b=VAE_STRIDE)
    num_frames = (mask.shape[0] + FRAME_STEP - 1) // FRAME_STEP
    return F.interpolate(cells[None], size=(num_frames, *cells.shape[2:]), mode="nearest-exact")[0]


def letterboxed(image: Tensor, height: int, width: int) -> Tensor:
    """Scale an image (3, x, y) bilinearly to fit into (3, height, width), centred on white."""
    rows, columns = image.shape[1:]
    if (rows, columns) == (height, width):
        return image
    scale = min(height / rows, width / columns)
    inner = max(int(rows * scale), 1), max(int(columns * scale), 1)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    canvas = image.new_full((3, height, width), _WHITE)
    scaled = F.interpolate(image[None], size=inner, mode="bilinear", align_corners=False)[0]
    canvas[:, top : top + inner[0], left : left + inner[1]] = scaled
    return canvas


def num_references(context: Tensor, latents: Tensor) -> int:
    """Return R of a VACE context (B, 96, R+F, H, W) beside latents (B, C, F, H, W)."""
    return context.shape[2] - latents.shape[2]


def with_references(latents: Tensor, context: Tensor) -> Tensor:
    """Return the reference latents of a VACE context, followed by a video's latents: (B, C, R+F, H, W).

    A VACE model is trained to generate both.
    """
    references = context[:, : latents.shape[1], : num_references(context, latents)]
    return torch.cat([references.to(latents), latents], dim=2)
