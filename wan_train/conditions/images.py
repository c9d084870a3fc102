"""What the DiT reads of the images that a video is made from; built here alone, for cache, preview and generator.

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
    """`image_latents` of a video of `num_frames` that begins with the first of the images (3, X, Y) in
    [-1, 1] and, if there is a second, ends with it.

    What is not given is mid grey, and all of it is encoded as one video (official Wan2.1 image2video).
    """
    height, width = images[0].shape[1:]
    video = torch.zeros(3, num_frames, height, width)
    given = [0, num_frames - 1][: len(images)]
    for frame, image in reversed(list(zip(given, images, strict=True))):
        video[:, frame] = image
    latents = encode(video[None])[0].cpu()
    return torch.cat([given_mask(given, num_frames, height, width).to(latents), latents])


def one_frame_latents(images: Sequence[Tensor], one_frame: OneFrame, encode: Encode) -> Tensor:
    """`image_latents` of an image that is made as one frame of several, the others given (3, X, Y).

    Each latent frame is an image of its own: a given one, or mid grey in the place of the one that is made.
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
    """`clip_features` of images (3, X, Y) that are scaled and cropped to the video's size."""
    # One at a time: equal, bit for bit, whatever is beside it.
    return torch.cat([encode(image[None])[0].cpu() for image in images])


def given_mask(given: Sequence[int], num_frames: int, height: int, width: int) -> Tensor:
    """The mask (4, F, H, W) of a video in which the pixel frames `given` are given: 1 there, else 0.

    The first latent frame holds its only pixel frame four times, each further one four pixel frames.
    """
    frames = torch.zeros(num_frames)
    frames[list(given)] = 1
    grouped = torch.cat([frames[:1].expand(FRAME_STEP), frames[1:]]).view(-1, FRAME_STEP)
    return grouped.T[:, :, None, None].expand(-1, -1, height // VAE_STRIDE, width // VAE_STRIDE)
