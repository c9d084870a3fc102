"""From prompts to conditions: the text encoder is there for as long as this takes and no longer."""

from collections.abc import Sequence

import torch

from wan_train.conditions import Conditions
from wan_train.log import get_logger
from wan_train.models.settings import TextEncoderSettings
from wan_train.models.text_encoder import load_text_encoder
from wan_train.precision import published_dtype
from wan_train.sampling.request import SampleRequest

log = get_logger(__name__)


def encode_prompts(
    requests: Sequence[SampleRequest], settings: TextEncoderSettings, device: torch.device
) -> dict[str, Conditions]:
    """Conditions of every prompt and negative prompt of the requests, by their text; each text is encoded once."""
    return encode_texts([text for r in requests for text in (r.prompt, r.negative_prompt)], settings, device)


def encode_texts(given: Sequence[str], settings: TextEncoderSettings, device: torch.device) -> dict[str, Conditions]:
    """Conditions of texts, by text; each is encoded once."""
    texts = list(dict.fromkeys(given))
    log.info("encoding %d prompts with %s", len(texts), settings.t5)
    encoder = load_text_encoder(
        settings.t5,
        tokenizer=settings.tokenizer or "auto",
        device=device,
        dtype=published_dtype(device),
        fp8=settings.fp8_t5,
    )
    with torch.no_grad():
        # One at a time: equal, bit for bit, whatever prompts are beside it.
        return {text: Conditions((encoder([text])[0].cpu(),)) for text in texts}
