"""Settings of the two cache tools."""

from dataclasses import dataclass

from dataset.settings import DatasetSettings
from wan_train.cli import Tool, option
from wan_train.models.settings import TextEncoderSettings, VaeSettings

_DEVICE_HELP = "Device to encode on, such as cuda or cpu; without it the first accelerator there is."
_SKIP_HELP = "Accepted for old commands: what is cached for the same clip and caption is always kept."


@dataclass(frozen=True)
class LatentRunSettings:
    """Encoding."""

    device: str = option("", _DEVICE_HELP)
    batch_size: int | None = option(
        None, "At most so many clips in one call of the VAE; also at most the dataset's batch_size.", minimum=1
    )
    num_workers: int = option(
        2, "Videos decoded ahead while the VAE computes; 0 decodes in turn and takes the least memory.", minimum=0
    )
    skip_existing: bool = option(False, _SKIP_HELP)


@dataclass(frozen=True)
class TextRunSettings:
    """Encoding."""

    device: str = option("", _DEVICE_HELP)
    batch_size: int = option(4, "Captions in one call of the text encoder.", minimum=1)
    skip_existing: bool = option(False, _SKIP_HELP)


@dataclass(frozen=True)
class CacheLatentsSettings:
    """All of `wan_cache_latents.py`."""

    dataset: DatasetSettings
    vae: VaeSettings
    run: LatentRunSettings


@dataclass(frozen=True)
class CacheTextSettings:
    """All of `wan_cache_text_encoder_outputs.py`."""

    dataset: DatasetSettings
    text_encoder: TextEncoderSettings
    run: TextRunSettings


LATENTS_TOOL = Tool(
    "wan_cache_latents.py",
    "Encode the clips and images that a dataset file describes with the VAE, so that training need not.",
    CacheLatentsSettings,
    "cache_tools.cache_latents:main",
)
TEXT_TOOL = Tool(
    "wan_cache_text_encoder_outputs.py",
    "Encode the captions of the files that a dataset file describes with the text encoder, so that training need not.",
    CacheTextSettings,
    "cache_tools.cache_text_encoder_outputs:main",
)
