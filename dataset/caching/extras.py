"""What a clip's cache file holds beside its latents, where the dataset file asks for it: names and shapes.

`latents_flipped` are the latents of the mirrored clip, `latents_control` (and `latents_control_flipped`) those of its
control, `mask` the weight of each latent cell. `latents_image` (4 channels of mask before those of the latents) and
`clip`, CLIP's tokens of each picture, are what a model for images is given of the clip's first frame, or of first and
last; `f_indices` is where the frames are in time of a picture that is trained as one of several. musubi-tuner
reads such names and uses what it knows.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from dataset.items import Clip, Item
from wan_train.conditions.kinds import (
    CAMERA,
    CLIP_FEATURES,
    CONTROL_LATENTS,
    FRAME_POSITIONS,
    IMAGE_LATENTS,
    KINDS,
    MOTION,
    REFERENCE,
    START_LATENTS,
    VACE_CONTEXT,
    ConditionKind,
)
from wan_train.models.variants import FRAME_STEP
from wan_train.precision import name_of

FLIPPED, CONTROL, CONTROL_FLIPPED, MASK = "latents_flipped", "latents_control", "latents_control_flipped", "mask"
IMAGE, IMAGE_FLIPPED = KINDS[IMAGE_LATENTS].key, KINDS[IMAGE_LATENTS].mirrored_key
CLIP, CLIP_FLIPPED = KINDS[CLIP_FEATURES].key, KINDS[CLIP_FEATURES].mirrored_key
POSITIONS = KINDS[FRAME_POSITIONS].key
MASK_DTYPE = torch.float16
_OF_TOKENS = (CLIP, CLIP_FLIPPED)
_OF_IMAGES = (IMAGE, IMAGE_FLIPPED)
_WITHOUT_SIZE = (*_OF_TOKENS, POSITIONS)


# Which items want a kind of condition.
WANTED: dict[str, Callable[[Item], bool]] = {
    IMAGE_LATENTS: lambda item: item.config.images is not None and not item.config.images.fused,
    CLIP_FEATURES: lambda item: item.config.images is not None and item.config.images.clip,
    FRAME_POSITIONS: lambda item: item.config.one_frame is not None,
    CONTROL_LATENTS: lambda item: False,
    START_LATENTS: lambda item: False,
    REFERENCE: lambda item: False,
    CAMERA: lambda item: False,
    VACE_CONTEXT: lambda item: False,
    MOTION: lambda item: False,
}


def wanted_conditions(item: Item) -> list[ConditionKind]:
    """The kinds of conditions that an item's files hold."""
    return [kind for name, kind in KINDS.items() if WANTED[name](item)]


def wanted_extras(item: Item) -> tuple[str, ...]:
    """The kinds of tensors that an item's files hold beside the latents, by their keys."""
    flips = item.config.flip_augment
    controlled = item.control is not None and item.config.one_frame is None  # as one frame of several it is among them
    kinds = {FLIPPED: flips, CONTROL: controlled, CONTROL_FLIPPED: controlled and flips, MASK: item.mask is not None}
    for kind in wanted_conditions(item):
        kinds |= {kind.key: True} | ({kind.mirrored_key: flips} if kind.mirrored_key else {})
    return tuple(kind for kind, wanted in kinds.items() if wanted)


def extra_sources(item: Item) -> dict[str, Path]:
    """The files beside its own that an item's caches are made from, by what they are for."""
    controls = {f"control_{number}" if number else "control": path for number, path in enumerate(item.controls)}
    sources = {**controls, "mask": item.mask}
    return {kind: path for kind, path in sources.items() if path is not None}


def extra_key(kind: str, clip: Clip, dtype: torch.dtype) -> str:
    """The name of a tensor: its kind, the latent's frames, height and width unless it is of tokens, and its dtype."""
    size = "" if kind in _WITHOUT_SIZE else f"{'x'.join(map(str, clip.latent_shape[1:]))}_"
    return f"{kind}_{size}{name_of(extra_dtype(kind, dtype))}"


def extra_dtype(kind: str, dtype: torch.dtype) -> torch.dtype:
    """What a kind is stored in beside latents in `dtype`; CLIP's tokens keep the bits that the official code gives
    them."""
    if kind in _OF_TOKENS:
        return torch.float32 if dtype is torch.float32 else torch.float16
    return {MASK: MASK_DTYPE, POSITIONS: torch.int32}.get(kind, dtype)


def extra_pattern(kind: str) -> re.Pattern[str]:
    """What the name of a tensor of this kind looks like, in whatever size and dtype."""
    return re.compile(rf"{kind}_[a-z0-9]+" if kind in _WITHOUT_SIZE else rf"{kind}_\d+x\d+x\d+_[a-z0-9]+")


def find_extras_misfit(clip: Clip, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype | None = None) -> str:
    """Why a file with these tensors lacks something that is wanted, in words; nothing where it lacks nothing.

    Without `dtype` any will do.
    """
    for kind in wanted_extras(clip.item):
        # Tokens that other tools cached are in another dtype than their name says, and good.
        exact = None if dtype is None or kind in _OF_TOKENS else re.escape(extra_key(kind, clip, dtype))
        pattern = extra_pattern(kind) if exact is None else re.compile(exact)
        found = [tuple(shape) for key, shape in shapes.items() if pattern.fullmatch(key)]
        if not found:
            return f"no {kind} in it"
        if not any(_has_shape(kind, clip, shape) for shape in found):
            return f"its {kind} is of another task, or of other pictures" if kind in _OF_TOKENS else f"no {kind} in it"
    return ""


def _has_shape(kind: str, clip: Clip, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a kind has the shape that it has beside the clip's latents."""
    if kind in _OF_TOKENS:
        pictures = shape[0] if len(shape) == 3 else 1
        return len(shape) in (2, 3) and pictures == clip.item.config.num_clip_images
    channels, *size = clip.latent_shape
    wanted: dict[str, tuple[int, ...]] = {
        MASK: (*size,),
        POSITIONS: (size[0],),
        **dict.fromkeys(_OF_IMAGES, (channels + FRAME_STEP, *size)),
    }
    return shape == wanted.get(kind, clip.latent_shape)
