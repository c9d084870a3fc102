"""Tokenize prompts for UMT5: clean the text, find a tokenizer, and read it.

A tokenizer is a `tokenizer.json`, used as it is, or a SentencePiece model: a `spiece.model`, or the same bytes inside a
text encoder checkpoint. Both are read here without network access and without running code from the folder.
"""

import html
import os
import struct
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ftfy
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.variants import TEXT_LENGTH
from wan_train.storage import TensorSource

HUB_ID = "google/umt5-xxl"
_SHOWN = 60  # characters of a text in a warning
_FILES = ("tokenizer.json", "spiece.model")
_DOWNLOAD = f"download tokenizer.json and spiece.model from https://huggingface.co/{HUB_ID}"

logger = get_logger(__name__)


def clean(text: str) -> str:
    """Clean a text as in Wan's training.

    Repair mis-decoded characters, unescape HTML entities (twice, for doubly escaped text), and collapse whitespace.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class Tokenizer:
    """Convert texts to token ids, at most 512 including the end token; create one with `read_tokenizer`."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_padding()
        backend.enable_truncation(TEXT_LENGTH)
        self._backend = backend
        self.num_tokens = backend.get_vocab_size()
        self._warned: set[str] = set()

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text. Warns once about each text that is truncated."""
        found = []
        for text in texts:
            ids, is_cut = self._encode(text)
            found.append(ids)
            if is_cut and text not in self._warned:
                self._warned.add(text)
                start = f"{' '.join(text.split())[:_SHOWN]} ..."
                logger.warning('the text "%s" is longer than %d tokens and is truncated', start, TEXT_LENGTH)
        return found

    def find_cut(self, texts: Iterable[str]) -> set[str]:
        """Return the texts that are too long and will be truncated; these are not warned about any more."""
        cut = {text for text in texts if self._encode(text)[1]}
        self._warned |= cut
        return cut

    def _encode(self, text: str) -> tuple[list[int], bool]:
        # One at a time: a batch would start threads, which do not survive the fork of a data loader.
        encoding = self._backend.encode(clean(text))
        return encoding.ids, bool(encoding.overflowing)


def find_tokenizer(wanted: str | os.PathLike[str], source: TensorSource, *, embedded: bool) -> Path | None:
    """Return the tokenizer file for the text encoder `source`; None means the one embedded in it.

    `wanted` is a folder or file, or "auto": the folder google/umt5-xxl next to the encoder's file, else the embedded
    tokenizer, else Hugging Face's, from the local cache or the network. Raises InputError if there is none.
    """
    if wanted != "auto":
        return _file_of(Path(wanted))
    if not isinstance(source, Mapping):
        path = Path(source)
        for folder in (path / HUB_ID, path.parent / HUB_ID):
            if folder.is_dir():
                return _file_of(folder)
    return None if embedded else _fetch()


def _file_of(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"no such tokenizer folder: {path}")
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    raise InputError(f"{path} has no tokenizer ({' or '.join(_FILES)}): {_DOWNLOAD} into it")


def _fetch() -> Path:
    from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache

    for name in _FILES:
        cached = try_to_load_from_cache(HUB_ID, name)
        if isinstance(cached, str):
            return Path(cached)
    # The hub's own client would retry for half a minute before it fails.
    if not constants.HF_HUB_OFFLINE and _is_reachable(hf_hub_url(HUB_ID, _FILES[0])):
        logger.info("downloading the tokenizer %s", HUB_ID)
        try:
            return Path(hf_hub_download(HUB_ID, _FILES[0]))
        except OSError as problem:
            logger.warning("the download failed: %s", problem)
    raise InputError(
        f"no local tokenizer found and the Hugging Face hub cannot be reached: {_DOWNLOAD} into a folder {HUB_ID} "
        "next to the text encoder's file, or give their folder with --tokenizer"
    )


def _is_reachable(url: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json` or a SentencePiece model. Raises InputError if it cannot be read."""
    if path.suffix != ".json":
        return tokenizer_of_sentencepiece(path.read_bytes(), str(path))
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as problem:  # the library raises nothing narrower
        raise InputError(f"{path} is not a readable tokenizer ({problem}): {_DOWNLOAD}") from None


_END = "</s>"


def tokenizer_of_sentencepiece(model: bytes, label: str) -> Tokenizer:
    """Build a tokenizer from a SentencePiece unigram model. Raises InputError, naming `label`, if it is not one.

    As in Hugging Face's conversion for T5, characters that no piece covers are unknown; byte fallback is not used.
    """
    try:
        vocabulary, unknown, character_map = _parse_model(model)
        end = [piece for piece, _ in vocabulary].index(_END)
        backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unknown, byte_fallback=False))
        if character_map:
            backend.normalizer = normalizers.Precompiled(character_map)
    except Exception as problem:  # the library raises nothing narrower
        raise InputError(f"{label} is not a valid SentencePiece unigram model ({problem}): {_DOWNLOAD}") from None
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.post_processor = processors.TemplateProcessing(single=f"$A {_END}", special_tokens=[(_END, end)])
    return Tokenizer(backend)


def _parse_model(model: bytes) -> tuple[list[tuple[str, float]], int, bytes]:
    """Return the pieces with their scores, the index of the unknown piece, and the normaliser's character map.

    Field numbers are those of sentencepiece_model.proto.
    """
    vocabulary: list[tuple[str, float]] = []
    unknown, character_map = 0, None
    for number, value in _read_fields(model):
        fields = dict(_read_fields(value)) if isinstance(value, bytes) else {}
        if number == 1:
            vocabulary.append((fields[1].decode(), struct.unpack("<f", fields.get(2, bytes(4)))[0]))
            if fields.get(3) == 2:
                unknown = len(vocabulary) - 1
        elif number == 2 and fields.get(3, 1) != 1:
            raise ValueError("not of type unigram")
        elif number == 3:
            character_map = fields.get(2, b"")
    if character_map is None:  # the last of the three
        raise ValueError("truncated")
    return vocabulary, unknown, character_map


def _read_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of every field of a protobuf message: an int for a varint, else the bytes."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _read_varint(message, at)
            yield key >> 3, value
            continue
        size, at = _read_varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + size > len(message):
            raise ValueError("truncated")
        yield key >> 3, message[at : at + size]
        at += size


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
