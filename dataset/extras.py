"""What a clip's cache file holds beside its latents, where the dataset file asks for it: names and shapes.

`latents_flipped` are the latents of the mirrored clip, `latents_control` (and `latents_control_flipped`) those of its
control, `mask` the weight of each latent cell. musubi-tuner reads such names and uses what it knows.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dataset.items import Clip, Item
from wan_train.precision import name_of

FLIPPED, CONTROL, CONTROL_FLIPPED, MASK = "latents_flipped", "latents_control", "latents_control_flipped", "mask"
MASK_DTYPE = torch.float16


def wanted_extras(item: Item) -> tuple[str, ...]:
    """The kinds of tensors that an item's files hold beside the latents."""
    flips = item.config.flip_augment
    kinds = {
        FLIPPED: flips,
        CONTROL: item.control is not None,
        CONTROL_FLIPPED: item.control is not None and flips,
        MASK: item.mask is not None,
    }
    return tuple(kind for kind, wanted in kinds.items() if wanted)


def extra_sources(item: Item) -> dict[str, Path]:
    """The files beside its own that an item's caches are made from, by what they are for."""
    sources = {"control": item.control, "mask": item.mask}
    return {kind: path for kind, path in sources.items() if path is not None}


def extra_key(kind: str, clip: Clip, dtype: torch.dtype) -> str:
    """The name of a tensor: its kind, the latent's frames, height and width, and its dtype."""
    stored = MASK_DTYPE if kind == MASK else dtype
    return f"{kind}_{'x'.join(map(str, clip.latent_shape[1:]))}_{name_of(stored)}"


def extra_pattern(kind: str) -> re.Pattern[str]:
    """What the name of a tensor of this kind looks like, in whatever size and dtype."""
    return re.compile(rf"{kind}_\d+x\d+x\d+_[a-z0-9]+")


def find_extras_misfit(clip: Clip, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype | None = None) -> str:
    """Why a file with these tensors lacks something that is wanted, in words; nothing where it lacks nothing.

    Without `dtype` any will do.
    """
    for kind in wanted_extras(clip.item):
        shape = clip.latent_shape[1:] if kind == MASK else clip.latent_shape
        pattern = extra_pattern(kind) if dtype is None else re.compile(re.escape(extra_key(kind, clip, dtype)))
        if not any(pattern.fullmatch(key) and tuple(found) == shape for key, found in shapes.items()):
            return f"no {kind} in it"
    return ""
