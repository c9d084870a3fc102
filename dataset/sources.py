"""From a dataset's folder to its items, and from items to the clips that they yield. Nothing is decoded."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dataset.buckets import choose_bucket, describe_size
from dataset.config import DatasetConfig
from dataset.frames import clip_positions, kept_frames
from dataset.items import Clip, Item
from dataset.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, MediaInfo, probe
from wan_train.cli import InputError
from wan_train.log import get_logger
from wan_train.models.variants import SIZE_STEP

logger = get_logger(__name__)

_NUM_PROBES = 4  # headers read at once; opening files waits more than it computes
_NUM_SHOWN = 10


@dataclass(frozen=True)
class Plan:
    """What a dataset yields: its items, their clips in order, and the items too short for any clip."""

    config: DatasetConfig
    items: tuple[Item, ...]
    clips: tuple[Clip, ...]
    too_short: tuple[Item, ...]


def list_items(config: DatasetConfig, *, allow_missing_captions: bool) -> list[Item]:
    """Every image or video of a dataset's folder with its caption, sorted by name; hidden files are passed over.

    Raises InputError for a folder without any, for two files of one stem (their caches would collide) and for missing
    captions, which `allow_missing_captions` turns into empty text and a warning.
    """
    suffixes = VIDEO_SUFFIXES if config.is_video else IMAGE_SUFFIXES
    try:
        found = sorted(config.directory.iterdir())
    except OSError as problem:
        raise InputError(f"{config}: cannot read the folder: {problem.strerror}") from None
    paths = [p for p in found if p.suffix.lower() in suffixes and not p.name.startswith(".") and p.is_file()]
    if not paths:
        kind = "videos" if config.is_video else "images"
        raise InputError(f"{config}: no {kind} in the folder; read are {', '.join(suffixes)}")
    _refuse_equal_stems(config, paths)
    captions = {path: config.directory / f"{path.stem}{config.caption_extension}" for path in paths}
    missing = [path.name for path, caption in captions.items() if not caption.is_file()]
    if missing and not allow_missing_captions:
        raise InputError(
            f"{config}: {len(missing)} of {len(paths)} files have no {config.caption_extension} caption"
            f" ({name_some(missing)}): write them, or train on empty text with --allow_missing_captions"
        )
    if missing:
        logger.warning("%s: empty text for %d files without a caption (%s)", config, len(missing), name_some(missing))
    items = [Item(config, path, _read_caption(caption)) for path, caption in captions.items()]
    blank = [item.path.name for item in items if not item.caption and item.path.name not in missing]
    if blank:
        logger.warning("%s: %d captions are empty (%s)", config, len(blank), name_some(blank))
    return items


def plan_clips(config: DatasetConfig, items: Sequence[Item]) -> Plan:
    """The clips that a dataset's items yield, from the headers of the files alone.

    Raises InputError when there is none, or for a file that cannot be read.
    """
    with ThreadPoolExecutor(_NUM_PROBES) as pool:
        headers = pool.map(probe, [item.path for item in items])
        # The bar appears only when there is time to look at it.
        shown = tqdm(headers, desc="reading headers", total=len(items), unit="file", delay=2, leave=False)
        clips = {item: _clips_of(item, header) for item, header in zip(items, shown, strict=True)}
    found = tuple(clip for of_item in clips.values() for clip in of_item)
    too_short = tuple(item for item, of_item in clips.items() if not of_item)
    if not found:
        raise InputError(
            f"{config}: no clip at all: each of {len(items)} videos is shorter than {min(config.target_frames)} frames"
            f"{_after_rate(config)} ({name_some(item.path.name for item in items)}): lower target_frames"
        )
    return Plan(config, tuple(items), found, too_short)


def warn_too_short(plans: Iterable[Plan]) -> None:
    """Say which items give no clip since they are shorter than every target."""
    for plan in plans:
        if plan.too_short:
            logger.warning(
                "%s: %d of %d videos give no clip, they have fewer than %d frames%s (%s)",
                plan.config,
                len(plan.too_short),
                len(plan.items),
                min(plan.config.target_frames),
                _after_rate(plan.config),
                name_some(item.path.name for item in plan.too_short),
            )


def name_some(names: Iterable[str]) -> str:
    """The first ten names, and how many more there are."""
    known = list(names)
    more = len(known) - _NUM_SHOWN
    return ", ".join(known[:_NUM_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _clips_of(item: Item, header: MediaInfo) -> list[Clip]:
    config = item.config
    source_size = (header.width, header.height)
    size = choose_bucket(
        source_size, config.resolution, enable_bucket=config.enable_bucket, no_upscale=config.bucket_no_upscale
    )
    if min(size) < SIZE_STEP:
        raise InputError(
            f"{item.path} is {describe_size(source_size)}: with bucket_no_upscale a side takes {SIZE_STEP} or more"
        )
    if not config.is_video:
        return [Clip(item, 0, (0,), size, source_size)]
    kept = kept_frames(header.num_frames, config.source_fps)
    positions = clip_positions(
        len(kept), config.target_frames, config.frame_extraction, frame_sample=config.frame_sample
    )
    return [Clip(item, start, kept[start : start + length], size, source_size) for start, length in positions]


def _refuse_equal_stems(config: DatasetConfig, paths: Sequence[Path]) -> None:
    stems = defaultdict(list)
    for path in paths:
        stems[path.stem].append(path.name)
    clashes = [" and ".join(names) for names in stems.values() if len(names) > 1]
    if clashes:
        raise InputError(
            f"{config}: files of one name share a caption and a cache ({name_some(clashes)}): rename one of each"
        )


def _read_caption(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"{path} cannot be read as UTF-8 text ({problem}): save it as UTF-8") from None


def _after_rate(config: DatasetConfig) -> str:
    return f" after source_fps {config.source_fps:g}" if config.source_fps else ""
