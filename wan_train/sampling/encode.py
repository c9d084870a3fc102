"""From prompts to conditions: the text encoder is there for as long as this takes and no longer."""

from collections.abc import Sequence

import torch

from wan_train.conditions import Conditions
from wan_train.log import get_logger
from wan_train.models.settings import TextEncoderSettings
from wan_train.models.text_encoder import TextEncoder, load_text_encoder
from wan_train.precision import published_dtype

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
