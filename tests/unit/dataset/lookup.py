"""Whether a cache is there that training may read, looked up anew each time."""

from pathlib import Path

import torch

from dataset.caching.manifest import Manifest
from dataset.caching.staleness import latents_state, text_state
from dataset.items import Clip, Item


def has_latents(clip: Clip, dtype: torch.dtype | None = None) -> bool:
    return latents_state(clip, _forgetful(clip.item), dtype=dtype).usable


def has_text(item: Item) -> bool:
    return text_state(item, _forgetful(item)).usable


def _forgetful(item: Item) -> Manifest:
    """A manifest that knows nothing and is never written."""
    return Manifest(Path(item.config.cache_directory) / "none")
