"""Names and shapes of the optional tensors in a clip's cache file, beside its latents.

`latents_flipped` are the latents of the mirrored clip, `latents_control` (and `latents_control_flipped`) those of its
control, and `mask` is the loss weight of each latent cell. `latents_image` (4 mask channels before those of the
latents) and `clip`, CLIP's tokens of each image, condition a model on the clip's first frame, or on its first and last.
`f_indices` are the temporal positions of an image that is trained as one frame of several. Control models read
`latents_start` and `latents_reference`, the latents of one image each, `vace_context`, `camera` with one entry per
pixel frame, and `motion_bucket`. musubi-tuner ignores names that it does not know.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from dataset.config import DatasetConfig
from dataset.items import Clip, Item
from wan_train.conditions.camera import ENTRY_LENGTH
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
from wan_train.conditions.vace import CONTEXT_CHANNELS
from wan_train.models.variants import FRAME_STEP, ControlInputs
from wan_train.precision import name_of

FLIPPED, MASK = "latents_flipped", "mask"
CONTROL, CONTROL_FLIPPED = KINDS[CONTROL_LATENTS].key, KINDS[CONTROL_LATENTS].mirrored_key
IMAGE, IMAGE_FLIPPED = KINDS[IMAGE_LATENTS].key, KINDS[IMAGE_LATENTS].mirrored_key
CLIP, CLIP_FLIPPED = KINDS[CLIP_FEATURES].key, KINDS[CLIP_FEATURES].mirrored_key
POSITIONS = KINDS[FRAME_POSITIONS].key
MASK_DTYPE = torch.float16


def _keys(name: str) -> tuple[str, ...]:
    return tuple(filter(None, (KINDS[name].key, KINDS[name].mirrored_key)))


_OF_TOKENS, _OF_IMAGES, _OF_CAMERAS = _keys(CLIP_FEATURES), _keys(IMAGE_LATENTS), _keys(CAMERA)
_OF_VACE, _OF_ONE_FRAME = _keys(VACE_CONTEXT), (*_keys(START_LATENTS), *_keys(REFERENCE))
_WITHOUT_SIZE = (*_OF_TOKENS, *_OF_CAMERAS, *_keys(MOTION), POSITIONS)
_DTYPES = {MASK: MASK_DTYPE, **dict.fromkeys((POSITIONS, *_keys(MOTION)), torch.int32)}
_DTYPES |= dict.fromkeys(_OF_CAMERAS, torch.float32)
# musubi-tuner's caches contain it: the latents of a start image are those of the first frame of a video that begins
# with it.
STAND_INS = dict(zip(_keys(START_LATENTS), _OF_IMAGES, strict=True))


def has_start(config: DatasetConfig) -> bool:
    """Return whether a model receives the first frame of a dataset's clips as an image."""
    images = config.images
    return images is not None and not images.fused and (not images.optional or config.start_image)


def read_references(item: Item) -> tuple[Path, ...]:
    """Return the reference images of an item that its model reads: all of them in a VACE context, else one."""
    control = item.config.control or ControlInputs()
    return item.references if control.vace else item.references[: int(control.reference)]


def _wants_start(item: Item, *, alone: bool) -> bool:
    images = item.config.images
    return images is not None and images.alone == alone and has_start(item.config)


def _wants_clip(item: Item) -> bool:
    images = item.config.images
    return images is not None and images.clip and (has_start(item.config) or bool(read_references(item)))


def _is_vace(item: Item) -> bool:
    return item.config.control is not None and item.config.control.vace


# Whether an item needs each kind of condition.
WANTED: dict[str, Callable[[Item], bool]] = {
    IMAGE_LATENTS: lambda item: _wants_start(item, alone=False),
    CLIP_FEATURES: _wants_clip,
    FRAME_POSITIONS: lambda item: item.config.one_frame is not None,
    CONTROL_LATENTS: lambda item: item.config.control is not None and item.config.control.video and bool(item.controls),
    START_LATENTS: lambda item: _wants_start(item, alone=True),
    REFERENCE: lambda item: not _is_vace(item) and bool(read_references(item)),
    CAMERA: lambda item: item.config.control is not None and item.config.control.camera and item.camera is not None,
    VACE_CONTEXT: _is_vace,
    MOTION: lambda item: item.motion_bucket_id is not None,
}


def wanted_conditions(item: Item) -> list[ConditionKind]:
    """Return the kinds of conditions in an item's cache files."""
    return [kind for name, kind in KINDS.items() if WANTED[name](item)]


def wanted_extras(item: Item) -> tuple[str, ...]:
    """Return the keys of the optional tensors in an item's cache files."""
    flips = item.config.flip_augment
    # With one_frame a control is part of the latents, and with VACE part of the context.
    controlled = item.control is not None and item.config.one_frame is None and not _is_vace(item)
    kinds = {FLIPPED: flips, CONTROL: controlled, CONTROL_FLIPPED: controlled and flips, MASK: item.mask is not None}
    for kind in wanted_conditions(item):
        kinds |= {kind.key: True} | ({kind.mirrored_key: flips} if kind.mirrored_key else {})
    return tuple(kind for kind, wanted in kinds.items() if wanted)


def extra_sources(item: Item) -> dict[str, Path]:
    """Return the accompanying files that an item's caches are made from, by their purpose."""
    control = item.config.control or ControlInputs()
    camera = item.camera.path if control.camera and item.camera else None
    sources = {
        **_numbered("control", item.controls),
        "mask": item.mask,
        **_numbered("reference", read_references(item)),
        "vace_mask": item.vace_mask if control.vace else None,
        "camera": camera,
    }
    return {kind: path for kind, path in sources.items() if path is not None}


def _numbered(name: str, paths: Sequence[Path]) -> dict[str, Path]:
    return {f"{name}_{number}" if number else name: path for number, path in enumerate(paths)}


def extra_key(condition: str, clip: Clip, dtype: torch.dtype) -> str:
    """Return a tensor's name: its kind, its frames, height and width unless it holds tokens, and its dtype."""
    size = "" if condition in _WITHOUT_SIZE else f"{'x'.join(map(str, _shape_of(condition, clip)[-3:]))}_"
    return f"{condition}_{size}{name_of(extra_dtype(condition, dtype))}"


def extra_dtype(condition: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a kind of tensor beside latents in `dtype`; CLIP's tokens keep the precision of the official
    code."""
    if condition in _OF_TOKENS:
        return torch.float32 if dtype is torch.float32 else torch.float16
    return _DTYPES.get(condition, dtype)


def extra_pattern(condition: str) -> re.Pattern[str]:
    """Return a pattern for the names of a kind of tensor, in any size and dtype."""
    return re.compile(
        rf"{condition}_[a-z0-9]+" if condition in _WITHOUT_SIZE else rf"{condition}_\d+x\d+x\d+_[a-z0-9]+"
    )


def find_extras_misfit(clip: Clip, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype | None = None) -> str:
    """Return why a file with these tensors lacks a required one, or "" if none is missing.

    With `dtype` None, any dtype is accepted.
    """
    for kind in wanted_extras(clip.item):
        if kind in STAND_INS and not _keys_like(kind, shapes) and _has_any(STAND_INS[kind], clip, shapes):
            continue
        # Tokens cached by other tools may differ in dtype from their name; they are valid.
        exact = None if dtype is None or kind in _OF_TOKENS else re.escape(extra_key(kind, clip, dtype))
        pattern = extra_pattern(kind) if exact is None else re.compile(exact)
        found = [tuple(shape) for key, shape in shapes.items() if pattern.fullmatch(key)]
        if kind in _OF_VACE and _keys_like(kind, shapes) and not _has_any(kind, clip, shapes):
            return f"{kind} with a different number of references"
        if not found:
            return f"no {kind}"
        if not any(_has_shape(kind, clip, shape) for shape in found):
            return f"{kind} for a different task or different images" if kind in _OF_TOKENS else f"no {kind}"
    return ""


def _keys_like(condition: str, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    return list(filter(extra_pattern(condition).fullmatch, shapes))


def _has_any(condition: str, clip: Clip, shapes: Mapping[str, Sequence[int]]) -> bool:
    return any(_has_shape(condition, clip, tuple(shapes[key])) for key in _keys_like(condition, shapes))


def _has_shape(condition: str, clip: Clip, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor of this kind has the shape that the clip's latents require."""
    if condition in _OF_TOKENS:
        images = shape[0] if len(shape) == 3 else 1
        return len(shape) in (2, 3) and images == clip.item.config.num_clip_images
    return shape == _shape_of(condition, clip)


def _shape_of(condition: str, clip: Clip) -> tuple[int, ...]:
    """Return the shape of this kind's tensor beside the clip's latents; not defined for CLIP's tokens."""
    channels, frames, *size = clip.latent_shape
    wanted: dict[str, tuple[int, ...]] = {
        MASK: (frames, *size),
        POSITIONS: (frames,),
        KINDS[MOTION].key: (),
        **dict.fromkeys(_OF_IMAGES, (channels + FRAME_STEP, frames, *size)),
        **dict.fromkeys(_OF_ONE_FRAME, (channels, 1, *size)),
        **dict.fromkeys(_OF_CAMERAS, (clip.num_frames, ENTRY_LENGTH)),
        **dict.fromkeys(_OF_VACE, (CONTEXT_CHANNELS, len(read_references(clip.item)) + frames, *size)),
    }
    return wanted.get(condition, clip.latent_shape)
