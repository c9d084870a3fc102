"""Cache prompt embeddings on disk."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from wan_train.conditions.conditions import Conditions
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.fingerprint import fingerprint
from wan_train.models.settings import TextEncoderSettings
from wan_train.precision import name_of, published_dtype
from wan_train.storage import read_tensors, save_tensors

log = get_logger(__name__)

_KEY = "context"


class TextCache:
    """A folder with one file per embedded text.

    Files are specific to the text encoder, the tokenizer and the precision. Without a folder the cache is disabled.
    """

    def __init__(self, folder: str | None, settings: TextEncoderSettings, device: torch.device) -> None:
        self._folder = Path(folder) if folder else None
        dtype = published_dtype(device)
        configuration = (settings.tokenizer, settings.fp8_t5, "stored" if dtype is None else name_of(dtype))
        self._encoder = f"{fingerprint(settings.t5)} {configuration}" if folder else ""

    def find(self, texts: Sequence[str]) -> dict[str, Conditions]:
        """Return the conditions of the texts that are in the cache."""
        return {text: found for text in texts if (found := self._read(text)) is not None}

    def keep(self, conditions: dict[str, Conditions]) -> None:
        """Store the embeddings, by text."""
        for text, condition in conditions.items():
            if self._folder is not None:
                save_tensors(self._path(self._folder, text), {_KEY: condition.context[0]}, {"prompt": text})

    def _read(self, text: str) -> Conditions | None:
        if self._folder is None or not (path := self._path(self._folder, text)).is_file():
            return None
        try:
            return Conditions((dict(read_tensors(path))[_KEY].clone(),))
        except (InputError, KeyError):
            log.warning("%s in --text_cache is damaged: encoding the prompt again", path)
            return None

    def _path(self, folder: Path, text: str) -> Path:
        return folder / f"{hashlib.sha256(f'{self._encoder} {text}'.encode()).hexdigest()[:32]}.safetensors"
