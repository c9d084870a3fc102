"""Cache files: names, keys and metadata, with one writer and one reader. The format is musubi-tuner's."""

import hashlib
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dataset.caching.extras import STAND_INS, extra_dtype, extra_key, extra_pattern
from dataset.caching.recipe import RECIPE_KEY, Recipe, write_recipe
from dataset.items import Clip, Item
from wan_train.errors import InputError
from wan_train.models.variants import FRAME_STEP
from wan_train.precision import name_of
from wan_train.storage import read_tensors, save_tensors

ARCHITECTURE = "wan"
_FORMAT_VERSION = "1.0.1"
# File systems limit the bytes of a name; these are the usual suffixes after the stem in names of latents.
_LONGEST_NAME = 255
_BEHIND_VIDEO, _BEHIND_IMAGE = "_00000-000_0000x0000_wan.safetensors", "_0000x0000_wan.safetensors"
_SHORT_STEM = 160
LATENTS_KEY = re.compile(r"latents_\d+x\d+x\d+_\w+")


def latents_path(clip: Clip) -> Path:
    """Return the path of a clip's latents; the name contains an image's own size, or the bucket size of a video."""
    config, stem = clip.item.config, _stem(clip.item)
    width, height = clip.size if config.is_video else clip.source_size
    span = f"{clip.start:05d}-{clip.num_frames:03d}_" if config.is_video else ""
    return config.cache_directory / f"{stem}_{span}{width:04d}x{height:04d}_{ARCHITECTURE}.safetensors"


def text_path(item: Item) -> Path:
    """Return the path of an item's text embedding, which its clips share."""
    return item.config.cache_directory / f"{_stem(item)}_{ARCHITECTURE}_te.safetensors"


def _stem(item: Item) -> str:
    """Return the stem of an item's cache names: the item's own, or, if too long for a file system, its beginning and a
    hash."""
    stem = os.fsencode(item.path.stem)
    behind = _BEHIND_VIDEO if item.config.is_video else _BEHIND_IMAGE
    if len(stem) + len(behind) <= _LONGEST_NAME:
        return item.path.stem
    return f"{stem[:_SHORT_STEM].decode(errors='ignore')}~{hashlib.sha256(stem).hexdigest()[:12]}"


def find_text_misfit(item: Item, names: Collection[str], metadata: Mapping[str, str]) -> str:
    """Return why a file with these tensors and this metadata does not match the item's text, or "" if it matches.

    Additional content is ignored.
    """
    if any(metadata.get(f"caption{number}") != caption for number, caption in enumerate(item.captions, 1)):
        return "different caption"
    lacking = [text for name, text in text_names(item).items() if not find_key(_text_key(name), names)]
    return ("no embedding" if any(lacking) else "no embedding of empty text") if lacking else ""


def text_names(item: Item) -> dict[str, str]:
    """Return all texts that training may use for an item, by tensor name without the dtype.

    The first name is musubi-tuner's only one; empty text is included if captions are dropped.
    """
    texts = {_text_name(variant): caption for variant, caption in enumerate(item.captions)}
    return texts | ({_text_name(None): ""} if item.config.caption_dropout_rate else {})


def save_latents(
    clip: Clip,
    latents: Tensor,
    dtype: torch.dtype,
    recipe: Recipe | None = None,
    *,
    extras: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a clip's normalised latents (C, F, H, W) and the extra tensors, by key as in `dataset.caching.extras`.

    Raises InputError if they contain NaN or Inf.
    """
    assert latents.shape == clip.latent_shape
    tensors = {_latents_key(clip, dtype): latents.to(dtype)}
    for kind, tensor in (extras or {}).items():
        tensors[extra_key(kind, clip, dtype)] = tensor.to(extra_dtype(kind, dtype))
    if not all(map(_is_finite, tensors.values())):
        raise InputError(
            f"{clip.item.path}, from frame {clip.start}: its latents contain NaN or Inf in {name_of(dtype)}:"
            " use --vae_dtype fp32, or remove the file from its folder"
        )
    width, height = clip.size if clip.item.config.is_video else clip.source_size
    metadata = {
        "architecture": ARCHITECTURE,
        "width": str(width),
        "height": str(height),
        "format_version": _FORMAT_VERSION,
    }
    if clip.item.config.is_video:
        metadata["frame_count"] = str(clip.num_frames)
    if recipe:
        metadata[RECIPE_KEY] = write_recipe(recipe)
    save_tensors(latents_path(clip), tensors, metadata)


def save_text(item: Item, embeddings: Mapping[str, Tensor], recipe: Recipe | None = None) -> None:
    """Write the embeddings (L, dim) of an item's texts in bfloat16; `embeddings` maps each text to its embedding.

    Raises InputError if they contain NaN or Inf.
    """
    dtype = torch.bfloat16
    stored = {f"{name}_{name_of(dtype)}": embeddings[text].to(dtype) for name, text in text_names(item).items()}
    if not all(map(_is_finite, stored.values())):
        raise InputError(f"{item.path}: the embedding of its caption contains NaN or Inf: check --t5 and the caption")
    metadata = {"architecture": ARCHITECTURE, "format_version": _FORMAT_VERSION}
    metadata |= {f"caption{number}": caption for number, caption in enumerate(item.captions, 1)}
    if recipe:
        metadata[RECIPE_KEY] = write_recipe(recipe)
    save_tensors(text_path(item), stored, metadata)


def read_latents(clip: Clip) -> Tensor:
    """Return a clip's normalised latents (C, F, H, W), in the dtype of the file."""
    return _read(latents_path(clip), LATENTS_KEY)


def read_extra(clip: Clip, condition: str) -> Tensor:
    """Return a clip's tensor of a kind listed by `extras.wanted_extras`, in the dtype of the file.

    Files of other tools without start latents hold them as the first frame, without mask, of the stand-in tensor.
    """
    path = latents_path(clip)
    if (tensor := _find(path, extra_pattern(condition))) is not None:
        return tensor
    if condition in STAND_INS:
        return _read(path, extra_pattern(STAND_INS[condition]))[FRAME_STEP:, :1]
    raise _gone(path)


def read_text(item: Item, variant: int | None = 0) -> Tensor:
    """Return the embedding (L, dim) of one of an item's captions (None: of empty text), in the dtype of the file."""
    return _read(text_path(item), _text_key(_text_name(variant)))


def _is_finite(tensor: Tensor) -> bool:
    # Min and max propagate NaN and Inf, and aminmax is twenty times as fast as isfinite.
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def find_key(pattern: re.Pattern[str], names: Iterable[str]) -> str | None:
    """Return the first tensor name that matches the pattern."""
    return next(filter(pattern.fullmatch, names), None)


def _text_name(variant: int | None) -> str:
    if variant is None:
        return "varlen_t5_empty"
    return f"varlen_t5_v{variant + 1}" if variant else "varlen_t5"


def _text_key(name: str) -> re.Pattern[str]:
    """Return a pattern that matches only this text's tensor, in any dtype."""
    return re.compile(rf"{name}_(?!v\d+_|empty_)\w+")


def _latents_key(clip: Clip, dtype: torch.dtype) -> str:
    return f"latents_{'x'.join(map(str, clip.latent_shape[1:]))}_{name_of(dtype)}"


def _find(path: Path, key: re.Pattern[str]) -> Tensor | None:
    return next((tensor for name, tensor in read_tensors(path) if key.fullmatch(name)), None)


def _read(path: Path, key: re.Pattern[str]) -> Tensor:
    tensor = _find(path, key)
    if tensor is None:
        raise _gone(path)
    return tensor


def _gone(path: Path) -> InputError:
    return InputError(f"{path} has changed since training started: create the cache again")
