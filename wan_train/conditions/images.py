"""Conditions of first-frame, last-frame and control images, for caching, previews and the generator.

Legend: B batch, C channels of latents, F latent frames, H W latent size, N pixel frames, X Y pixel height and width,
I image tokens.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wan_train.models.one_frame import OneFrame
from wan_train.models.variants import FRAME_STEP, VAE_STRIDE

Encode = Callable[[Tensor], Tensor]  # pixels (1, 3, N, X, Y) -> latents (1, C, F, H, W)
EncodeClip = Callable[[Tensor], Tensor]  # pixels (K, 3, X, Y) -> CLIP tokens (K, tokens, width)


def given_latents(images: Sequence[Tensor], num_frames: int, encode: Encode) -> Tensor:
    """Return `image_latents` (4+C, F, H, W) of a video whose first frame and, if given, last frame are these images.

    The images are (3, X, Y) in [-1, 1]. The other frames are mid grey, and all are encoded as one video (official
    Wan2.1 image2video).
    """
    height, width = images[0].shape[1:]
    video = torch.zeros(3, num_frames, height, width)
    given = [0, num_frames - 1][: len(images)]
    for frame, image in reversed(list(zip(given, images, strict=True))):
        video[:, frame] = image
    latents = encode(video[None])[0].cpu()
    return torch.cat([given_mask(given, num_frames, height, width).to(latents), latents])


def one_frame_latents(images: Sequence[Tensor], one_frame: OneFrame, encode: Encode) -> Tensor:
    """Return `image_latents` for one-frame inference with these control images (3, X, Y).

    Each latent frame is encoded as a separate image: a control image, or mid grey for the target.
    """
    given = dict(zip(one_frame.controls, images, strict=True))
    frames = []
    for position in one_frame.positions:
        image = given.get(position, torch.zeros_like(images[0]))
        latents = encode(image[None, :, None])[0].cpu()
        mask = torch.full_like(latents[:FRAME_STEP], float(position in given))
        frames.append(torch.cat([mask, latents]))
    return torch.cat(frames, dim=1)


def clip_tokens(images: Sequence[Tensor], encode: EncodeClip) -> Tensor:
    """Return `clip_features` of images (3, X, Y), already scaled and cropped to the video's size."""
    # One at a time, so that each is bit-exact in any batch.
    return torch.cat([encode(image[None])[0].cpu() for image in images])


def given_mask(given: Sequence[int], num_frames: int, height: int, width: int) -> Tensor:
    """Return the mask (4, F, H, W) of a video: 1 for the pixel frames `given`, else 0.

    The first latent frame repeats its only pixel frame four times, each later one has four pixel frames.
    """
    frames = torch.zeros(num_frames)
    frames[list(given)] = 1
    grouped = torch.cat([frames[:1].expand(FRAME_STEP), frames[1:]]).view(-1, FRAME_STEP)
    return grouped.T[:, :, None, None].expand(-1, -1, height // VAE_STRIDE, width // VAE_STRIDE)
