"""The cache files: names, keys and metadata, with one writer and one reader; the format is musubi-tuner's."""

import re
from pathlib import Path

import torch
from torch import Tensor

from dataset.items import Clip, Item
from wan_train.cli import InputError
from wan_train.precision import name_of
from wan_train.storage import Header, read_header, read_tensors, save_tensors

_ARCHITECTURE = "wan"
_FORMAT_VERSION = "1.0.1"
_LATENTS = re.compile(r"latents_\d+x\d+x\d+_\w+")
_TEXT = re.compile(r"varlen_t5_\w+")


def latents_path(clip: Clip) -> Path:
    """Where a clip's latents are kept; an image's name tells its own size, a video's the size of its bucket."""
    config, stem = clip.item.config, clip.item.path.stem
    width, height = clip.size if config.is_video else clip.source_size
    span = f"{clip.start:05d}-{clip.num_frames:03d}_" if config.is_video else ""
    return config.cache_directory / f"{stem}_{span}{width:04d}x{height:04d}_{_ARCHITECTURE}.safetensors"


def text_path(item: Item) -> Path:
    """Where an item's text embedding is kept; its clips share it."""
    return item.config.cache_directory / f"{item.path.stem}_{_ARCHITECTURE}_te.safetensors"


def has_latents(clip: Clip, dtype: torch.dtype | None = None) -> bool:
    """Whether whole latents of this very clip are there, in `dtype` if one is named."""
    header = _header(latents_path(clip))
    if header is None:
        return False
    if dtype is not None:
        return header.shapes.get(_latents_key(clip, dtype)) == clip.latent_shape
    return any(_LATENTS.fullmatch(key) and shape == clip.latent_shape for key, shape in header.shapes.items())


def has_text(item: Item) -> bool:
    """Whether an embedding of this item's present caption is there."""
    header = _header(text_path(item))
    return (
        header is not None
        and header.metadata.get("caption1") == item.caption
        and any(map(_TEXT.fullmatch, header.shapes))
    )


def save_latents(clip: Clip, latents: Tensor, dtype: torch.dtype) -> None:
    """Write a clip's normalised latents (C, F, H, W); InputError where they are not finite numbers."""
    assert latents.shape == clip.latent_shape
    stored = latents.to(dtype)
    if not torch.isfinite(stored).all():
        raise InputError(
            f"{clip.item.path}, from frame {clip.start}: its latents are not finite in {name_of(dtype)}:"
            " take --vae_dtype fp32, or the file out of its folder"
        )
    width, height = clip.size if clip.item.config.is_video else clip.source_size
    metadata = {
        "architecture": _ARCHITECTURE,
        "width": str(width),
        "height": str(height),
        "format_version": _FORMAT_VERSION,
    }
    if clip.item.config.is_video:
        metadata["frame_count"] = str(clip.num_frames)
    save_tensors(latents_path(clip), {_latents_key(clip, dtype): stored}, metadata)


def save_text(item: Item, embedding: Tensor) -> None:
    """Write an item's text embedding (L, dim) in bfloat16; InputError where it is not finite numbers."""
    stored = embedding.to(torch.bfloat16)
    if not torch.isfinite(stored).all():
        raise InputError(f"{item.path}: the embedding of its caption is not finite: check --t5 and the caption")
    metadata = {"architecture": _ARCHITECTURE, "caption1": item.caption, "format_version": _FORMAT_VERSION}
    save_tensors(text_path(item), {f"varlen_t5_{name_of(stored.dtype)}": stored}, metadata)


def read_latents(clip: Clip) -> Tensor:
    """A clip's normalised latents (C, F, H, W), in the dtype of the file."""
    return _read(latents_path(clip), _LATENTS)


def read_text(item: Item) -> Tensor:
    """An item's text embedding (L, dim), in the dtype of the file."""
    return _read(text_path(item), _TEXT)


def _latents_key(clip: Clip, dtype: torch.dtype) -> str:
    return f"latents_{'x'.join(map(str, clip.latent_shape[1:]))}_{name_of(dtype)}"


def _header(path: Path) -> Header | None:
    """The header of a whole file, or None."""
    if not path.is_file():
        return None
    try:
        return read_header(path)
    except InputError:
        return None


def _read(path: Path, key: re.Pattern[str]) -> Tensor:
    for name, tensor in read_tensors(path):
        if key.fullmatch(name):
            return tensor
    raise InputError(f"{path} no longer holds what training read in it at the start: make the cache again")
