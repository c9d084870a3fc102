"""What the DiT reads beside the noisy latents; built here alone, for cache, preview and generator.

Legend: B batch, C channels of latents, F latent frames, H W latent size, N pixel frames, X Y pixel height and width,
I image tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wan_train.models.one_frame import OneFrame
from wan_train.models.variants import FRAME_STEP, VAE_STRIDE

Encode = Callable[[Tensor], Tensor]  # pixels (1, 3, N, X, Y) -> latents (1, C, F, H, W)
See = Callable[[Tensor], Tensor]  # pixels (K, 3, X, Y) -> CLIP tokens (K, tokens, width)


@dataclass(frozen=True)
class ImageConditions:
    """What a model reads of the pictures that a video is made from.

    `latents` (4+C, F, H, W): a mask of what is given, then the latents of that; `clip` (I, width), the tokens of each
    picture behind one another; `positions` (F,), where the frames are in time if not one after the other. A model that
    reads the first frame fused has `first` (C, 1, H, W) alone, its latents.
    """

    latents: Tensor | None = None
    clip: Tensor | None = None
    positions: Tensor | None = None
    first: Tensor | None = None


@dataclass(frozen=True)
class Conditions:
    """The conditioning of a batch: `context`, a text embedding (L_i, text_dim) for each sample.

    `image_latents` (B, 4+C, F, H, W), `clip_features` (B, I, width) and `frame_positions` (F,) are what
    `ImageConditions` hold of each sample, where there are pictures. `first_frame` (B, C, 1, H, W) is what takes the
    place of the noisy first frame, in the samples for which `has_first` (B,) says so; see `fuse`.
    """

    context: tuple[Tensor, ...]
    image_latents: Tensor | None = None
    clip_features: Tensor | None = None
    frame_positions: Tensor | None = None
    first_frame: Tensor | None = None
    has_first: Tensor | None = None

    def to(self, device: torch.device) -> "Conditions":
        """The same on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        # Positions are turned into angles in main memory.
        moved.pop("frame_positions", None)
        return replace(self, context=tuple(rows.to(device) for rows in self.context), **moved)

    def joined(self, other: "Conditions") -> "Conditions":
        """A batch of these and the other's samples."""
        return Conditions(
            (*self.context, *other.context),
            _joined(self.image_latents, other.image_latents),
            _joined(self.clip_features, other.clip_features),
            self.frame_positions,
            _joined(self.first_frame, other.first_frame),
            _joined(self.has_first, other.has_first),
        )

    def with_images(self, images: ImageConditions | None) -> "Conditions":
        """A single text with the pictures of its video."""
        if images is None:
            return self
        if images.first is not None:
            return replace(self, first_frame=images.first[None], has_first=torch.ones(1, dtype=torch.bool))
        clip = None if images.clip is None else images.clip[None]
        latents = None if images.latents is None else images.latents[None]
        return Conditions(self.context, latents, clip, images.positions)

    def with_context(self, context: Sequence[Tensor]) -> "Conditions":
        """Other texts beside the same pictures."""
        return replace(self, context=tuple(context))

    def inputs(self) -> dict[str, list[Tensor] | Tensor]:
        """Keyword arguments for the DiT."""
        given = {
            "image_latents": self.image_latents,
            "clip_features": self.clip_features,
            "frame_positions": self.frame_positions,
        }
        return {"context": list(self.context)} | {name: value for name, value in given.items() if value is not None}

    def fuse(self, noisy: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents (B, C, F, H, W) with the first frames that are given, and timesteps (B, F) with 0 for these;
        latents and timesteps (B,) as they are where none is given (official Wan2.2 TI2V)."""
        if self.first_frame is None:
            return noisy, timestep
        assert self.has_first is not None
        chosen = self.has_first.view(-1, 1, 1, 1, 1)
        begun = torch.where(chosen, self.first_frame.to(noisy), noisy[:, :, :1])
        each = timestep.unsqueeze(1).repeat(1, noisy.shape[2])
        each[:, 0] = torch.where(self.has_first, 0.0, each[:, 0])
        return torch.cat([begun, noisy[:, :, 1:]], dim=2), each


def given_latents(pictures: Sequence[Tensor], num_frames: int, encode: Encode) -> Tensor:
    """`ImageConditions.latents` of a video of `num_frames` that begins with the first of the pictures (3, X, Y) in
    [-1, 1] and, if there is a second, ends with it.

    What is not given is mid grey, and all of it is encoded as one video (official Wan2.1 image2video).
    """
    height, width = pictures[0].shape[1:]
    video = torch.zeros(3, num_frames, height, width)
    given = [0, num_frames - 1][: len(pictures)]
    for frame, picture in reversed(list(zip(given, pictures, strict=True))):
        video[:, frame] = picture
    latents = encode(video[None])[0].cpu()
    return torch.cat([given_mask(given, num_frames, height, width).to(latents), latents])


def one_frame_latents(pictures: Sequence[Tensor], one_frame: OneFrame, encode: Encode) -> Tensor:
    """`ImageConditions.latents` of a picture that is made as one frame of several, the others given (3, X, Y).

    Each latent frame is a picture of its own: a given one, or mid grey in the place of the one that is made.
    """
    given = dict(zip(one_frame.controls, pictures, strict=True))
    frames = []
    for position in one_frame.positions:
        picture = given.get(position, torch.zeros_like(pictures[0]))
        latents = encode(picture[None, :, None])[0].cpu()
        mask = torch.full_like(latents[:FRAME_STEP], float(position in given))
        frames.append(torch.cat([mask, latents]))
    return torch.cat(frames, dim=1)


def seen_tokens(pictures: Sequence[Tensor], see: See) -> Tensor:
    """`ImageConditions.clip` of pictures (3, X, Y) that are scaled and cropped to the video's size."""
    # One at a time: equal, bit for bit, whatever is beside it.
    return torch.cat([see(picture[None])[0].cpu() for picture in pictures])


def given_mask(given: Sequence[int], num_frames: int, height: int, width: int) -> Tensor:
    """The mask (4, F, H, W) of a video in which the pixel frames `given` are given: 1 there, else 0.

    The first latent frame holds its only pixel frame four times, each further one four pixel frames.
    """
    frames = torch.zeros(num_frames)
    frames[list(given)] = 1
    grouped = torch.cat([frames[:1].expand(FRAME_STEP), frames[1:]]).view(-1, FRAME_STEP)
    return grouped.T[:, :, None, None].expand(-1, -1, height // VAE_STRIDE, width // VAE_STRIDE)


def _joined(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    assert (one is None) == (other is None), "samples of a batch have pictures, or none has"
    return None if one is None or other is None else torch.cat([one, other])
