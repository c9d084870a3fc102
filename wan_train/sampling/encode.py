"""Encode prompts, images and controls into conditions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wan_train.conditions.conditions import Conditions, ImageConditions
from wan_train.conditions.control import start_latents
from wan_train.conditions.images import Encode, EncodeClip, clip_tokens, given_latents, one_frame_latents
from wan_train.conditions.kinds import CLIP_FEATURES, FRAME_POSITIONS, IMAGE_LATENTS, START_LATENTS
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.additions import NO_INIT, extended_header
from wan_train.models.encoders.image import ImageEncoder, check_image_encoder, load_image_encoder
from wan_train.models.encoders.text import TextEncoder, load_text_encoder
from wan_train.models.loading import image_width, official_shapes
from wan_train.models.settings import DitSettings, ImageEncoderSettings, InitSettings, TextEncoderSettings
from wan_train.models.vae.vae import WanVAE
from wan_train.models.variants import Variant
from wan_train.placement.sharding import Sharding
from wan_train.precision import published_dtype
from wan_train.sampling.control_inputs import encode_controls
from wan_train.sampling.images import load_images
from wan_train.sampling.request import SampleRequest

log = get_logger(__name__)


def encode_texts(given: Sequence[str], settings: TextEncoderSettings, device: torch.device) -> dict[str, Conditions]:
    """Return the conditions of texts, by text; each is encoded once."""
    texts = list(dict.fromkeys(given))
    log.info("encoding %d prompts with %s", len(texts), settings.t5)
    return encode_with(open_text_encoder(settings, device), texts)


def open_text_encoder(
    settings: TextEncoderSettings, device: torch.device, *, sharding: Sharding | None = None
) -> TextEncoder:
    """Load the text encoder, its blocks sharded over the processes of `sharding`."""
    return load_text_encoder(
        settings.t5,
        tokenizer=settings.tokenizer or "auto",
        device=device,
        dtype=published_dtype(device),
        fp8=settings.fp8_t5,
        sharding=sharding,
    )


@torch.no_grad()
def encode_with(encoder: TextEncoder, texts: Sequence[str]) -> dict[str, Conditions]:
    """Return the conditions of texts, by text, on the CPU; one at a time, so that each is bit-exact in any batch."""
    return {text: Conditions((encoder([text])[0].cpu(),)) for text in texts}


def open_image_encoder(settings: ImageEncoderSettings, device: torch.device) -> ImageEncoder:
    """Load the image encoder: in float16 on an accelerator, as in the official code."""
    log.info("loading %s", settings.clip)
    return load_image_encoder(settings.clip, device=device, dtype=None if device.type == "cpu" else torch.float16)


def encode_clip_requests(
    requests: Sequence[SampleRequest], settings: ImageEncoderSettings, device: torch.device
) -> list[Tensor | None]:
    """Return the CLIP tokens (I, width) of each request, in host memory; None if its model does not read them."""
    if not any(request.clip_paths for request in requests):
        return [None] * len(requests)
    encoder = open_image_encoder(settings, device)
    return [encode_clip(request, encoder) if request.clip_paths else None for request in requests]


def encode_clip(request: SampleRequest, encoder: EncodeClip) -> Tensor:
    """Return the CLIP tokens (I, width) of a request's images, in host memory."""
    return clip_tokens(load_images(request.clip_paths, request.size), encoder)


def encode_images(
    request: SampleRequest, vae: WanVAE | None, tokens: Tensor | None, device: torch.device
) -> ImageConditions | None:
    """Return the conditions of a request's images and controls, in host memory; None without any.

    `vae` is required if `request.is_from_pixels`.
    """

    def encode(pixels: Tensor) -> Tensor:
        assert vae is not None
        return vae.encode(pixels.to(device))

    if request.variant.is_fused and request.image_paths:
        (image,) = _images(request)
        return ImageConditions(first=encode(image[None, :, None])[0].cpu())
    extras = encode_controls(request, encode) | _encode_images(request, encode)
    if tokens is not None:
        extras[CLIP_FEATURES] = tokens
    return ImageConditions(extras) if extras else None


def _encode_images(request: SampleRequest, encode: Encode) -> dict[str, Tensor]:
    """Return the conditions of the first-frame, last-frame or control images, by name of `KINDS`."""
    if not request.image_paths:
        return {}
    assert request.variant.images is not None
    images, one_frame = _images(request), request.one_frame
    if one_frame is not None:
        positions = torch.tensor(one_frame.positions)
        return {IMAGE_LATENTS: one_frame_latents(images, one_frame, encode), FRAME_POSITIONS: positions}
    if request.variant.images.alone:
        return {START_LATENTS: start_latents(images[0], encode)}
    return {IMAGE_LATENTS: given_latents(images, request.frames, encode)}


def _images(request: SampleRequest) -> list[Tensor]:
    return load_images(request.image_paths, request.size)


def check_given_clip(
    settings: ImageEncoderSettings, variant: Variant, dit: DitSettings, init: InitSettings = NO_INIT
) -> None:
    """Raise InputError if the image encoder is missing, is not one, or does not have the width that the DiT expects.

    Only headers are read. Tasks with optional images need it only for requests with images: see `check_encodable`.
    """
    if not variant.reads_clip:
        if settings.clip:
            log.info("--clip is not used by --task %s", variant.name)
        return
    assert variant.images is not None
    if not settings.clip:
        if variant.images.optional:
            return
        raise _clip_missing(variant)
    shapes = official_shapes(extended_header(dit, init).shapes)
    found, read = check_image_encoder(settings.clip), image_width(shapes)
    if found != read:
        raise InputError(
            f"--clip {settings.clip} has width {found}, but --dit {dit.dit} expects {read}: give the image encoder that"
            " the DiT was trained with"
        )


def check_encodable(
    request: SampleRequest, clip: ImageEncoderSettings, dits: Sequence[DitSettings], init: InitSettings = NO_INIT
) -> None:
    """Raise InputError if a request needs an image encoder that is not given, or layers that one of the models lacks.

    Only headers are read.
    """
    if request.clip_paths and not clip.clip:
        raise _clip_missing(request.variant)
    if request.reference_image is None and request.motion_bucket_id is None:
        return
    for dit in dits:
        names = official_shapes(extended_header(dit, init).shapes)
        if request.reference_image and "ref_conv.weight" not in names:
            raise InputError(
                f"--reference_image: {dit.dit} has no layers for it (ref_conv): use a Fun-Control V1.1 model, or leave"
                " it out"
            )
        if request.motion_bucket_id is not None and "motion_controller.linear.0.weight" not in names:
            raise InputError(f"--motion_bucket_id: {dit.dit} has no motion controller: give --motion_controller")


def _clip_missing(variant: Variant) -> InputError:
    return InputError(
        f"--clip is missing: --task {variant.name} also encodes its images with CLIP; give"
        " models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    )
