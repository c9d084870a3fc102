"""Build the non-text conditions of a clip, with the functions that previews and the generator use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dataset.caching.extras import has_start, wanted_conditions
from dataset.items import Clip
from wan_train.conditions.camera import mirrored
from wan_train.conditions.control import control_latents, reference_latents, start_latents
from wan_train.conditions.images import Encode, EncodeClip, clip_tokens, given_latents
from wan_train.conditions.kinds import (
    CAMERA,
    CLIP_FEATURES,
    CONTROL_LATENTS,
    IMAGE_LATENTS,
    MOTION,
    REFERENCE,
    START_LATENTS,
    VACE_CONTEXT,
)
from wan_train.conditions.vace import vace_context


@dataclass(frozen=True)
class Given:
    """The inputs of a clip's conditions: pixels in [-1, 1] of the clip, `video` (3, N, X, Y), of its control and of its
    references (3, x, y); VACE's mask (N, X, Y) in [0, 1]; camera entries (N, 19)."""

    clip: Clip
    video: Tensor
    control: Tensor | None = None
    references: tuple[Tensor, ...] = ()
    vace_mask: Tensor | None = None
    camera: Tensor | None = None

    def mirrored(self) -> "Given":
        """Return a horizontally mirrored copy."""
        return replace(
            self,
            video=self.video.flip(-1),
            control=None if self.control is None else self.control.flip(-1),
            references=tuple(image.flip(-1) for image in self.references),
            vace_mask=None if self.vace_mask is None else self.vace_mask.flip(-1),
            camera=None if self.camera is None else mirrored(self.camera),
        )

    @property
    def ends(self) -> list[Tensor]:
        """Return the images (3, X, Y) for an image model, on the CPU: the first frame, or the first and last."""
        images = self.clip.item.config.images
        assert images is not None
        return [self.video[:, 0].cpu(), self.video[:, -1].cpu()][: 1 + images.last]


@dataclass(frozen=True)
class Encoders:
    """The encoders of pixels: the VAE, and CLIP if the model reads images through it."""

    encode: Encode
    see: EncodeClip | None = None


def build_conditions(given: Given, encoders: Encoders, *, flipped: bool = False) -> dict[str, Tensor]:
    """Return the condition tensors of a clip's file, by key; with `flipped`, under the keys of the mirrored clip, and
    only those that mirroring changes."""
    kinds = [kind for kind in wanted_conditions(given.clip.item) if kind.mirrored_key or not flipped]
    shown = given.mirrored() if flipped else given
    return {kind.key_of(flipped=flipped): BUILDERS[kind.name](shown, encoders) for kind in kinds}


def stacked_tokens(images: Sequence[Tensor], see: EncodeClip | None) -> Tensor:
    """Return CLIP's tokens of images (3, X, Y) as stored in files: (tokens, width), those of several images stacked."""
    assert see is not None
    tokens = clip_tokens(images, see)
    return tokens.unflatten(0, (len(images), -1)) if len(images) > 1 else tokens


def _image_latents(given: Given, encoders: Encoders) -> Tensor:
    return given_latents(given.ends, given.clip.num_frames, encoders.encode)


def _clip_tokens(given: Given, encoders: Encoders) -> Tensor:
    """Return the tokens of the reference, if there is one (VideoX-Fun), else of the images the video starts from."""
    images = given.clip.item.config.images
    assert images is not None and (given.references or has_start(given.clip.item.config))
    seen = given.references[:1] or given.ends[: images.num_clip_images]
    return stacked_tokens(seen, encoders.see)


def _control_latents(given: Given, encoders: Encoders) -> Tensor:
    assert given.control is not None
    return control_latents(given.control, encoders.encode)


def _vace_context(given: Given, encoders: Encoders) -> Tensor:
    """Return the VACE context; without a control video, the clip itself under its mask is used (inpainting)."""
    video = given.video if given.control is None and given.vace_mask is not None else given.control
    _, *shape = given.video.shape
    rows, columns = shape[1:]
    return vace_context(
        video, given.vace_mask, given.references, encoders.encode, shape=(given.clip.num_frames, rows, columns)
    )


def _camera(given: Given, encoders: Encoders) -> Tensor:
    assert given.camera is not None
    return given.camera


BUILDERS: dict[str, Callable[[Given, Encoders], Tensor]] = {
    IMAGE_LATENTS: _image_latents,
    CLIP_FEATURES: _clip_tokens,
    CONTROL_LATENTS: _control_latents,
    START_LATENTS: lambda given, encoders: start_latents(given.ends[0], encoders.encode),
    REFERENCE: lambda given, encoders: reference_latents(given.references[0], encoders.encode),
    CAMERA: _camera,
    VACE_CONTEXT: _vace_context,
    MOTION: lambda given, encoders: torch.tensor(given.clip.item.motion_bucket_id, dtype=torch.int32),
}
