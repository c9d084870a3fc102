"""Whether a cache file matches what would be written now, and if not, why. Nothing is decoded."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import torch

from dataset.caching.cache import ARCHITECTURE, LATENTS_KEY, find_key, find_text_misfit, latents_path, text_path
from dataset.caching.extras import CLIP, extra_sources, find_extras_misfit
from dataset.caching.manifest import Manifest
from dataset.caching.recipe import RECIPE_KEY, Recipe, gives_last, is_same, names_camera, places_in_time, read_recipe
from dataset.items import Clip, Item
from dataset.reading.probes import extra_reading
from wan_train.errors import InputError
from wan_train.precision import name_of
from wan_train.storage import read_header

LATENTS_NAME = re.compile(
    rf"(?P<stem>.+?)_((?P<start>\d{{5,}})-(?P<length>\d{{3,}})_)?(?P<width>\d{{4,}})x(?P<height>\d{{4,}})_{ARCHITECTURE}"
)
_TEXT_NAME = re.compile(rf".+_{ARCHITECTURE}_te")


class Staleness(Enum):
    """State of a cache file for a clip or caption; `FOREIGN` matches but has no recipe, as files of musubi-tuner."""

    UP_TO_DATE = "up to date"
    FOREIGN = "adopted"
    MISSING = "missing"
    STALE = "stale"
    TRUNCATED = "truncated"


@dataclass(frozen=True)
class CacheState:
    """The state of a cache file, and the reason."""

    path: Path
    kind: Staleness
    reason: str = ""

    @property
    def usable(self) -> bool:
        """Whether training can read it."""
        return self.kind in (Staleness.UP_TO_DATE, Staleness.FOREIGN)

    def __str__(self) -> str:
        return f"{self.path.name}: {self.reason or self.kind.value}"


class Facts(NamedTuple):
    """A cache file's tensor shapes and metadata."""

    shapes: dict[str, list[int]]
    metadata: dict[str, str]


def read_facts(path: Path, manifest: Manifest) -> Facts | None:
    """Return a cache file's header, read once per state of the file; None if it is truncated or not a cache file."""
    found = manifest.recall("header", path, _read_header)
    return Facts(*found) if found else None


def latents_state(
    clip: Clip,
    manifest: Manifest,
    *,
    dtype: torch.dtype | None = None,
    model: Path | None = None,
    image_model: Path | None = None,
) -> CacheState:
    """Return the state of a clip's latents, compared with `dtype` and the VAE and CLIP files if given."""
    path = latents_path(clip)
    facts = _facts_or_state(path, manifest)
    if isinstance(facts, CacheState):
        return facts
    reason = _compare_contents(clip, facts, dtype)
    recipe, is_ours = _recipe_of(facts)
    if not is_ours:
        return CacheState(path, Staleness.STALE, reason) if reason else CacheState(path, Staleness.FOREIGN)
    reason = reason or (
        _compare_recipe(clip, recipe, manifest, model, image_model) if recipe else "unsupported recipe version"
    )
    return CacheState(path, Staleness.STALE, reason) if reason else CacheState(path, Staleness.UP_TO_DATE)


def text_state(item: Item, manifest: Manifest, *, model: Path | None = None) -> CacheState:
    """Return the state of a caption's embedding, compared with the text encoder's file if given."""
    path = text_path(item)
    facts = _facts_or_state(path, manifest)
    if isinstance(facts, CacheState):
        return facts
    recipe, is_ours = _recipe_of(facts)
    if reason := find_text_misfit(item, facts.shapes, facts.metadata):
        return CacheState(path, Staleness.STALE, reason)
    if not is_ours:
        return CacheState(path, Staleness.FOREIGN)
    if recipe is None:
        return CacheState(path, Staleness.STALE, "unsupported recipe version")
    if model and not is_same(recipe.model, model, manifest):
        return CacheState(path, Staleness.STALE, f"different text encoder ({recipe.model.name})")
    return CacheState(path, Staleness.UP_TO_DATE)


def list_orphans(folder: Path, planned: Collection[Path], *, is_text: bool) -> list[Path]:
    """Return the files in a folder that are named like caches of one kind and are not among the planned ones."""
    names, pattern = {path.name for path in planned}, _TEXT_NAME if is_text else LATENTS_NAME
    if not folder.is_dir():
        return []
    found = (path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    return sorted(path for path in found if path.name not in names and pattern.fullmatch(path.stem))


def _facts_or_state(path: Path, manifest: Manifest) -> Facts | CacheState:
    """Return a cache file's facts, or its state if they cannot be read."""
    try:
        facts = read_facts(path, manifest)
    except OSError:
        return CacheState(path, Staleness.MISSING)
    return CacheState(path, Staleness.TRUNCATED) if facts is None else facts


def _compare_contents(clip: Clip, facts: Facts, dtype: torch.dtype | None) -> str:
    """Return why the tensors and metadata common to all tools do not match the clip, or "" if they do."""
    key = find_key(LATENTS_KEY, facts.shapes)
    if key is None:
        return "no latents"
    if facts.shapes[key][0] != clip.latent_shape[0]:
        return f"different VAE, with {facts.shapes[key][0]} channels"
    if tuple(facts.shapes[key]) != clip.latent_shape:
        return "different frames or size"
    if dtype is not None and not key.endswith(f"_{name_of(dtype)}"):
        return f"{re.sub(r'.*_', '', key)}, not {name_of(dtype)}"
    known = facts.metadata.get("architecture", ARCHITECTURE)
    if known != ARCHITECTURE:
        return f"different model family ({known})"
    if clip.item.config.is_video and facts.metadata.get("frame_count", str(clip.num_frames)) != str(clip.num_frames):
        return "different frames"
    return find_extras_misfit(clip, facts.shapes, dtype)


def _compare_recipe(
    clip: Clip, recipe: Recipe, manifest: Manifest, model: Path | None, image_model: Path | None
) -> str:
    if recipe.size != clip.size:
        return "different size"
    if recipe.frames != clip.frames:
        return "different frames"
    if recipe.positions != places_in_time(clip.item.config):
        return "different temporal positions"
    if clip.item.config.images is not None and recipe.last != gives_last(clip.item.config):
        return "different images"
    if recipe.source and not is_same(recipe.source, clip.item.path, manifest):
        return "source changed"
    if recipe.source and recipe.source.reading != clip.reading:
        return _compare_reading("source", recipe.source.reading, clip.reading)
    for kind, extra in extra_sources(clip.item).items():
        if kind not in recipe.extras or not is_same(recipe.extras[kind], extra, manifest):
            return f"{kind} changed"
        known, now = recipe.extras[kind].reading, extra_reading(clip.item, kind, extra, manifest)
        if known != now:
            return _compare_reading(kind, known, now)
    if told := _compare_conditions(clip.item, recipe):
        return told
    if model and not is_same(recipe.model, model, manifest):
        return f"different VAE ({recipe.model.name})"
    seen = recipe.extras.get(CLIP)
    if image_model and seen and not is_same(seen, image_model, manifest):
        return f"different CLIP ({seen.name})"
    return ""


def _compare_conditions(item: Item, recipe: Recipe) -> str:
    """Return what has changed in an item's conditions other than the contents of files, or which file was removed; else
    ""."""
    camera, control = names_camera(item), item.config.control
    if camera and recipe.camera != camera:
        return "camera changed"
    if item.motion_bucket_id is not None and recipe.motion_bucket != item.motion_bucket_id:
        return "motion bucket changed"
    if control is None or not (control.reference or control.vace):
        return ""
    # The tensors made from other removed files are no longer read.
    read = ("reference", "vace_mask", *(("control",) if control.vace else ()))
    gone = sorted(kind for kind in recipe.extras.keys() - extra_sources(item).keys() if kind.startswith(read))
    return f"{gone[0]} removed" if gone else ""


def _compare_reading(condition: str, known: str, now: str) -> str:
    return f"{condition} is now processed differently (then {known or 'as decoded'}, now {now or 'as decoded'})"


def _recipe_of(facts: Facts) -> tuple[Recipe | None, bool]:
    """Return the recipe, if it can be read, and whether there is one."""
    text = facts.metadata.get(RECIPE_KEY)
    return (read_recipe(text) if text else None), text is not None


def _read_header(path: Path) -> list[dict[str, object]] | None:
    try:
        header = read_header(path)
    except InputError:
        return None
    return [{key: list(shape) for key, shape in header.shapes.items()}, dict(header.metadata)]
