"""From prompts and pictures to conditions: each encoder is there for as long as this takes and no longer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wan_train.conditions.conditions import Conditions, ImageConditions
from wan_train.conditions.images import See, given_latents, one_frame_latents, seen_tokens
from wan_train.conditions.kinds import CLIP_FEATURES, FRAME_POSITIONS, IMAGE_LATENTS
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.encoders.image import ImageEncoder, check_image_encoder, load_image_encoder
from wan_train.models.encoders.text import TextEncoder, load_text_encoder
from wan_train.models.loading import image_width
from wan_train.models.settings import ImageEncoderSettings, TextEncoderSettings
from wan_train.models.vae.vae import WanVAE
from wan_train.models.variants import Variant
from wan_train.precision import published_dtype
from wan_train.sampling.pictures import load_pictures
from wan_train.sampling.request import SampleRequest

log = get_logger(__name__)


def encode_texts(given: Sequence[str], settings: TextEncoderSettings, device: torch.device) -> dict[str, Conditions]:
    """Conditions of texts, by text; each is encoded once."""
    texts = list(dict.fromkeys(given))
    log.info("encoding %d prompts with %s", len(texts), settings.t5)
    return encode_with(open_text_encoder(settings, device), texts)


def open_text_encoder(settings: TextEncoderSettings, device: torch.device) -> TextEncoder:
    """The text encoder as the settings want it."""
    return load_text_encoder(
        settings.t5,
        tokenizer=settings.tokenizer or "auto",
        device=device,
        dtype=published_dtype(device),
        fp8=settings.fp8_t5,
    )


@torch.no_grad()
def encode_with(encoder: TextEncoder, texts: Sequence[str]) -> dict[str, Conditions]:
    """Conditions of texts, by text, on the CPU. One at a time: equal, bit for bit, whatever prompts are beside it."""
    return {text: Conditions((encoder([text])[0].cpu(),)) for text in texts}


def open_image_encoder(settings: ImageEncoderSettings, device: torch.device) -> ImageEncoder:
    """The image encoder as the settings want it: in float16 on an accelerator, as the official code runs it."""
    log.info("loading %s", settings.clip)
    return load_image_encoder(settings.clip, device=device, dtype=None if device.type == "cpu" else torch.float16)


def see_requests(
    requests: Sequence[SampleRequest], settings: ImageEncoderSettings, device: torch.device
) -> list[Tensor | None]:
    """CLIP's tokens (I, width) of each request's pictures, in main memory, where its model reads them."""
    seeing = [request.variant.reads_clip for request in requests]
    if not any(seeing):
        return [None] * len(requests)
    encoder = open_image_encoder(settings, device)
    return [see_pictures(request, encoder) if sees else None for request, sees in zip(requests, seeing, strict=True)]


def see_pictures(request: SampleRequest, encoder: See) -> Tensor:
    """CLIP's tokens (I, width), in main memory, of a request's pictures."""
    assert request.variant.images is not None
    pictures = _pictures(request)
    return seen_tokens(pictures if request.one_frame else pictures[: request.variant.images.num_clip_images], encoder)


def encode_pictures(
    request: SampleRequest, vae: WanVAE, tokens: Tensor | None, device: torch.device
) -> ImageConditions | None:
    """What the DiT reads of a request's pictures, in main memory; None where it has none."""
    if not request.picture_paths:
        return None

    def encode(pixels: Tensor) -> Tensor:
        return vae.encode(pixels.to(device))

    pictures, one_frame = _pictures(request), request.one_frame
    if request.variant.is_fused:
        return ImageConditions(first=encode(pictures[0][None, :, None])[0].cpu())
    if one_frame is None:
        extras = {IMAGE_LATENTS: given_latents(pictures, request.frames, encode)}
    else:
        extras = {IMAGE_LATENTS: one_frame_latents(pictures, one_frame, encode)}
        extras[FRAME_POSITIONS] = torch.tensor(one_frame.positions)
    return ImageConditions(extras if tokens is None else {**extras, CLIP_FEATURES: tokens})


def _pictures(request: SampleRequest) -> list[Tensor]:
    return load_pictures(request.picture_paths, (request.width, request.height))


def check_given_clip(settings: ImageEncoderSettings, variant: Variant, dit: str) -> None:
    """InputError for an image encoder that a task needs and has not, that is none, or that is of another width than
    the DiT reads; headers alone are looked at."""
    if not variant.reads_clip:
        if settings.clip:
            log.info("--clip is not used: --task %s reads no CLIP tokens", variant.name)
        return
    if not settings.clip:
        raise InputError(
            f"--clip is missing: --task {variant.name} reads its pictures through CLIP too; give"
            " models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
        )
    found, read = check_image_encoder(settings.clip), image_width(dit)
    if found != read:
        raise InputError(
            f"--clip {settings.clip} gives tokens {found} wide, and --dit {dit} reads {read}: give the encoder that"
            " belongs to it"
        )
