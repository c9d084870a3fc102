"""Check before training that all caches exist and match the current data."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from dataset.caching.manifest import Manifest
from dataset.caching.staleness import CacheState, latents_state, text_state
from dataset.items import Clip, Item
from dataset.sources import ClipPlan, name_some
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.variants import VARIANTS

logger = get_logger(__name__)

Wanted = TypeVar("Wanted", Clip, Item)


class _Tool(NamedTuple):
    """The script that creates one kind of cache, and its model option."""

    kind: str
    program: str
    model: str


_LATENTS = _Tool("latent", "wan_cache_latents.py", "--vae")
_TEXT = _Tool("text", "wan_cache_text_encoder_outputs.py", "--t5")


def check_caches(plans: Sequence[ClipPlan], options: str) -> None:
    """Raise InputError, with the command to run (including the data `options`), if a cache cannot be used for training.

    This covers missing and truncated caches, and those made from another source, size, frames or caption. Sources of
    known size and modification time are not read.
    """
    problems = []
    for tool, states in (
        (_LATENTS, _look_up(plans, lambda plan: plan.clips, latents_state)),
        (_TEXT, _look_up(plans, lambda plan: tuple(dict.fromkeys(clip.item for clip in plan.clips)), text_state)),
    ):
        if bad := [state for state in states if not state.usable]:
            problems.append(
                f"{len(bad)} of {len(states)} {tool.kind} caches are missing or do not match the TOML"
                f" ({name_some(map(str, bad))}): run `python {tool.program} {options} {tool.model} ..."
                f"{_conditions(plans, tool)}`"
            )
    if problems:
        raise InputError("; ".join(problems))


def _conditions(plans: Sequence[ClipPlan], tool: _Tool) -> str:
    """Return the options for images and controls of the latent caching command."""
    config = plans[0].config
    if tool is not _LATENTS or (config.images is None and config.control is None):
        return ""
    # The first task that uses such caches.
    read = config.images, config.space, config.control
    task = next(
        variant.name for variant in VARIANTS.values() if (variant.images, variant.space, variant.control) == read
    )
    clip = config.images is not None and config.images.clip
    return f" --task {task}" + " --clip ..." * clip + " --one_frame" * (config.one_frame is not None)


def _look_up(
    plans: Sequence[ClipPlan],
    select: Callable[[ClipPlan], Sequence[Wanted]],
    look: Callable[[Wanted, Manifest], CacheState],
) -> list[CacheState]:
    states = []
    for plan in plans:
        with Manifest(plan.config.cache_directory) as manifest:
            states += [look(one, manifest) for one in select(plan)]
    return states
