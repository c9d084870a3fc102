"""Training without the sources: use the clips and captions in a cache folder unchecked."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataset.caching.cache import LATENTS_KEY, find_key, find_text_misfit, latents_path, text_path
from dataset.caching.extras import MASK, extra_pattern, find_extras_misfit
from dataset.caching.manifest import Manifest
from dataset.caching.recipe import RECIPE_KEY, gives_last, read_recipe
from dataset.caching.staleness import LATENTS_NAME, Facts, list_orphans, read_facts
from dataset.config import DatasetConfig
from dataset.items import CameraSource, Clip, Item
from dataset.sources import ClipPlan, name_some
from wan_train.conditions.kinds import CAMERA, CONTROL_LATENTS, KINDS, MOTION, REFERENCE, VACE_CONTEXT
from wan_train.errors import InputError
from wan_train.models.variants import FRAME_STEP


def plan_from_caches(config: DatasetConfig) -> ClipPlan:
    """Return the plan of a dataset's cache folder, sorted by name; the sources are neither read nor compared.

    Raises InputError if the folder has no latents, for truncated files and files that lack tensors required by the
    TOML, and for latents without a text embedding.
    """
    folder = config.cache_directory
    clips: dict[Item, list[Clip]] = {}
    items: dict[str, Item] = {}
    problems: list[str] = []
    with Manifest(folder) as manifest:
        for path in list_orphans(folder, (), is_text=False):
            named, facts = LATENTS_NAME.fullmatch(path.stem), read_facts(path, manifest)
            if not named or bool(named["start"]) != config.is_video:
                continue
            if facts is None:
                problems.append(f"{path.name}: truncated")
                continue
            item = items.get(named["stem"]) or _read_item(config, named["stem"], facts, manifest)
            clip = _read_clip(item, named, facts) if isinstance(item, Item) else item
            if isinstance(item, Item) and isinstance(clip, Clip):
                items[named["stem"]] = item
                clips.setdefault(item, []).append(clip)
            else:
                problems.append(f"{path.name}: {clip}")
    if problems:
        raise InputError(f"{config}: {len(problems)} caches cannot be used: {name_some(problems)}")
    if not clips:
        kind = "videos" if config.is_video else "images"
        raise InputError(f"{config}: no latents of {kind} in {folder}: cache them first, or copy their folder there")
    found = tuple(clip for of_item in clips.values() for clip in of_item)
    return ClipPlan(config, tuple(clips), found, ())


def _read_item(config: DatasetConfig, stem: str, latents: Facts, manifest: Manifest) -> Item | str:
    """Return the item of the latents and text with this stem, or a description of the problem."""
    # The suffix is unknown and not needed: caches are named after the stem.
    path = config.directory / f"{stem}.{'mp4' if config.is_video else 'png'}"
    bare = Item(config, path, ("",), **_partners_of(config, path, latents))
    try:
        facts = read_facts(text_path(bare), manifest)
    except OSError:
        return f"{text_path(bare).name} is missing"
    if facts is None:
        return f"{text_path(bare).name} is truncated"
    item = replace(bare, captions=_read_captions(facts.metadata))
    return find_text_misfit(item, facts.shapes, facts.metadata) or item


def _partners_of(config: DatasetConfig, path: Path, latents: Facts) -> dict[str, Any]:
    """Return placeholders for the files that accompanied an item, as far as its latents show that there were any."""
    found = {name: find_key(extra_pattern(kind.key), latents.shapes) for name, kind in KINDS.items()}
    recipe = read_recipe(latents.metadata.get(RECIPE_KEY, ""))
    return {
        "controls": (path,) * bool(found[CONTROL_LATENTS]),
        "mask": path if find_key(extra_pattern(MASK), latents.shapes) else None,
        "references": (path,) * _num_references(config, latents, found[REFERENCE], found[VACE_CONTEXT]),
        "vace_mask": path if found[VACE_CONTEXT] and recipe and "vace_mask" in recipe.extras else None,
        "camera": CameraSource() if found[CAMERA] else None,
        "motion_bucket_id": 0 if found[MOTION] else None,
    }


def _num_references(config: DatasetConfig, latents: Facts, reference: str | None, context: str | None) -> int:
    main = find_key(LATENTS_KEY, latents.shapes)
    if config.control is None or not config.control.vace:
        return int(reference is not None)
    # In the VACE context, reference frames come before those of the video.
    return max(latents.shapes[context][1] - latents.shapes[main][1], 0) if context and main else 0


def _read_captions(metadata: Mapping[str, str]) -> tuple[str, ...]:
    captions: list[str] = []
    while (key := f"caption{len(captions) + 1}") in metadata:
        captions.append(metadata[key])
    return tuple(captions) or ("",)


def _read_clip(item: Item, named: re.Match[str], facts: Facts) -> Clip | str:
    """Return the clip of cached latents, or a description of the problem; without a recipe, frames are consecutive."""
    key = find_key(LATENTS_KEY, facts.shapes)
    if key is None:
        return "no latents"
    channels, num_latents, height, width = facts.shapes[key]
    if channels != item.config.space.channels:
        return f"different VAE, with {channels} channels"
    stride = item.config.space.stride
    size = (width * stride, height * stride)
    start, length = int(named["start"] or 0), int(named["length"] or 1)
    one_frame = item.config.one_frame
    if num_latents != (len(one_frame.positions) if one_frame else (length - 1) // FRAME_STEP + 1):
        return "frames do not match its name"
    recipe = read_recipe(facts.metadata.get(RECIPE_KEY, ""))
    frames = recipe.frames if recipe else tuple(range(start, start + length))
    clip = Clip(item, start, frames, size, (int(named["width"]), int(named["height"])))
    if latents_path(clip).stem != named[0]:
        return "size does not match its name"
    if recipe and item.config.images is not None and recipe.last != gives_last(item.config):
        return "different images"
    return find_extras_misfit(clip, facts.shapes) or clip
