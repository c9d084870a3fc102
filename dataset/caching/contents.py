"""What each sample was made from, so that a resumed run can tell whether its data has changed."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from dataset.batching.batches import CachedDataset
from dataset.caching.cache import latents_path, text_path
from dataset.caching.manifest import Manifest
from dataset.caching.recipe import RECIPE_KEY, Fingerprint, Recipe, read_recipe
from dataset.caching.staleness import LATENTS_NAME, Facts, read_facts
from dataset.items import Clip
from dataset.sources import name_some


class Content(NamedTuple):
    """Digests of the inputs of a sample's latents (its files, frames and VAE), of its captions, and of the text
    encoder.

    A cache without a recipe has "", which equals everything.
    """

    latents: str
    captions: str
    encoder: str


Contents = Mapping[str, Content]  # by `SampleKey.item`

_CHANGES = (
    "{count} with a different video or image",
    "{count} with different captions",
    "{count} with a different text encoder",
)


def read_contents(dataset: CachedDataset) -> dict[str, Content]:
    """Return the current contents of each sample, read from its caches; only new headers are read."""
    found: dict[str, Content] = {}
    manifests: dict[int, Manifest] = {}
    for item, clip in dataset.clips.items():
        config = clip.item.config
        manifest = manifests.setdefault(config.number, Manifest(config.cache_directory))
        found[item] = _content_of(clip, manifest)
    for manifest in manifests.values():
        manifest.save()
    return found


def changes(before: Contents, now: Contents) -> list[str]:
    """Return descriptions of what has changed, each with the names of the first ten files."""
    both = [item for item in now if item in before]
    told = []
    for number, text in enumerate(_CHANGES):
        changed = [item for item in both if before[item][number] and now[item][number]]
        told += _told(text, (item for item in changed if before[item][number] != now[item][number]))
    new, gone = ([item for item in some if item not in others] for some, others in ((now, before), (before, now)))
    # Equal names in different folders: a cache folder was renamed, which also changes the noise of its samples.
    moved = {_file(item) for item in new} & {_file(item) for item in gone}
    told += _told("{count} that {is_} new", new, with_folder=moved)
    return told + _told("{count} that {is_} missing", gone, with_folder=moved)


def _told(text: str, items: Iterable[str], *, with_folder: Collection[str] = ()) -> list[str]:
    named = ((item.rpartition("/")[0], _file(item)) for item in items)
    names = list(dict.fromkeys(f"{folder}/{name}" if name in with_folder else name for folder, name in named))
    count = f"{len(names)} file{'s' * (len(names) != 1)}"
    is_ = "is" if len(names) == 1 else "are"
    return [f"{text.format(count=count, is_=is_)} ({name_some(names)})"] if names else []


def _file(item: str) -> str:
    """Return the name, without suffix, of a sample's file."""
    name = item.rpartition("/")[2]
    named = LATENTS_NAME.fullmatch(name)
    return named["stem"] if named else name


def _content_of(clip: Clip, manifest: Manifest) -> Content:
    latents = _recipe_of(read_facts(latents_path(clip), manifest))
    text = _recipe_of(read_facts(text_path(clip.item), manifest))
    return Content(
        latents=_digest(_made_of(latents)) if latents else "",
        captions=_digest(clip.item.captions),
        encoder=_digest([text.model.sha256, text.dtype]) if text else "",
    )


def _recipe_of(facts: Facts | None) -> Recipe | None:
    return read_recipe(facts.metadata.get(RECIPE_KEY, "")) if facts else None


def _made_of(recipe: Recipe) -> list[object]:
    """Return the content digests of a recipe; names and modification times may differ between machines and are left
    out."""

    def content(file: Fingerprint | None) -> str:
        return file.sha256 if file else ""

    extras = sorted((kind, content(extra)) for kind, extra in recipe.extras.items())
    files = [content(recipe.model), content(recipe.source), extras]
    made = [*files, recipe.dtype, recipe.start, recipe.frames, recipe.size, recipe.positions, recipe.last]
    # Added only where set, so that digests of other samples match those in older states.
    beside = {"camera": recipe.camera, "motion_bucket": recipe.motion_bucket}
    return made + [[name, value] for name, value in beside.items() if value not in ("", None)]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
