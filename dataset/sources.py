"""List the items of a dataset's folder, and plan the clips to cut from them. No frame is decoded."""

import functools
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from dataset.batching.buckets import choose_bucket, describe_size
from dataset.caching.cache import latents_path, text_path
from dataset.caching.manifest import Manifest
from dataset.config import DatasetConfig
from dataset.items import Clip, Item
from dataset.reading.frames import clip_positions, kept_frames, timed_frames
from dataset.reading.info import MediaInfo, recipe_words
from dataset.reading.listings import Entry, find_entries
from dataset.reading.pairs import check_pairs
from dataset.reading.partners import find_cameras, find_controls, find_masks, find_references, find_vace_masks
from dataset.reading.probes import recall_header
from dataset.reading.unread import find_unread
from wan_train.errors import InputError
from wan_train.file_names import check_name, shortened
from wan_train.log import get_logger

logger = get_logger(__name__)

_NUM_PROBES = 4  # headers read in parallel; opening files is I/O-bound
_NUM_SHOWN = 10
_RATE_TOLERANCE = 0.1  # frames per second; average rates of short files are inexact


@dataclass(frozen=True)
class ClipPlan:
    """The planned contents of a dataset: its items, their clips in order, items too short for any clip, and skipped
    files.

    `infos` maps each readable file's item to its media information.
    """

    config: DatasetConfig
    items: tuple[Item, ...]
    clips: tuple[Clip, ...]
    too_short: tuple[Item, ...]
    broken: tuple[Item, ...] = ()
    infos: Mapping[Item, MediaInfo] = field(default_factory=dict)


def list_items(config: DatasetConfig, *, allow_missing_captions: bool, with_partners: bool = True) -> list[Item]:
    """Return every image or video of a dataset with its captions and, unless `with_partners` is false, its accompanying
    files, in the order of `find_entries`.

    `caption_prefix` is prepended to every caption. With `allow_missing_captions`, missing captions become empty text
    with a warning. Raises InputError as `find_entries` does, for missing captions, and for two files with the same stem
    (their caches would collide).
    """
    entries = find_entries(config)
    refuse_equal_stems(config, [entry.path for entry in entries])
    missing = [entry.path.name for entry in entries if not entry.captions]
    if missing and not allow_missing_captions:
        label = "caption" if config.listing else f"{config.caption_extension} caption"
        raise InputError(
            f"{config}: {len(missing)} of {len(entries)} files have no {label} ({name_some(missing)}):"
            " add them, or train with empty captions with --allow_missing_captions"
        )
    if missing:
        logger.warning(
            "%s: using an empty caption for %d files without one (%s)", config, len(missing), name_some(missing)
        )
    blank = [entry.path.name for entry in entries if "" in entry.captions]
    if blank:
        logger.warning("%s: %d captions are empty (%s)", config, len(blank), name_some(blank))
    if unread := find_unread(config, [entry.path for entry in entries]):
        logger.warning("%s: %d files are ignored: %s", config, len(unread), name_some(map(str, unread)))
    prefix = config.caption_prefix
    captions = [tuple(f"{prefix}{caption}".strip() for caption in entry.captions or ("",)) for entry in entries]
    if with_partners:
        return _with_partners(config, entries, captions)
    return [Item(config, entry.path, texts) for entry, texts in zip(entries, captions, strict=True)]


def _with_partners(config: DatasetConfig, entries: Sequence[Entry], captions: Sequence[tuple[str, ...]]) -> list[Item]:
    """Return the entries' items with their accompanying files; warn about optional ones that are missing."""
    paths = [entry.path for entry in entries]
    controls, cameras = find_controls(config, entries), find_cameras(config, entries)
    masks, vace_masks = find_masks(config, paths), find_vace_masks(config, entries)
    references = find_references(config, entries)
    if config.control is not None and config.control.video and not any(controls):
        logger.warning("%s: no control_directory and no control_path: the model receives no control video", config)
    if config.control is not None and config.control.vace and config.control_directory:
        _warn_without(config, paths, controls, "control", "VACE uses the masked clip, or no video")
    if config.mask_directory:
        _warn_without(config, paths, masks, "mask", "the loss covers the whole image")
    if config.vace_mask_directory:
        _warn_without(config, paths, vace_masks, "VACE mask", "VACE generates the whole video")
    if config.reference_directory:
        _warn_without(config, paths, references, "reference", "they are trained without one")
    return [
        Item(
            config,
            path,
            texts,
            controls=controls[place],
            mask=masks[place],
            references=references[place],
            vace_mask=vace_masks[place],
            camera=cameras[place],
            motion_bucket_id=config.motion_bucket_id if bucket is None else bucket,
        )
        for place, (path, texts, bucket) in enumerate(
            zip(paths, captions, (entry.columns.motion_bucket_id for entry in entries), strict=True)
        )
    ]


def _warn_without(
    config: DatasetConfig, paths: Sequence[Path], found: Sequence[object], file_kind: str, consequence: str
) -> None:
    """Warn about the files for which nothing was `found`."""
    without = [path.name for path, partner in zip(paths, found, strict=True) if not partner]
    if without:
        told = f"{len(without)} of {len(paths)} files have no {file_kind} ({name_some(without)})"
        logger.warning("%s: %s: %s", config, told, consequence)


def plan_clips(config: DatasetConfig, items: Sequence[Item], *, skip_broken: bool = False) -> ClipPlan:
    """Return the clips of a dataset's items, based on file headers alone; known headers are not read again.

    Raises InputError if there are no clips, for an unreadable file (skipped with `skip_broken`), and, if the model
    reads controls, for a control that does not match its file, see `check_pairs`.
    """
    with Manifest(config.cache_directory) as manifest, ThreadPoolExecutor(_NUM_PROBES) as pool:
        with_times = config.source_fps == "auto"
        read = functools.partial(recall_header, manifest=manifest, with_times=with_times, skip_broken=skip_broken)
        headers = pool.map(read, [item.path for item in items])
        # The progress bar appears only if this takes a while.
        shown = tqdm(headers, desc="reading headers", total=len(items), unit="file", delay=2, leave=False)
        infos = {item: header for item, header in zip(items, shown, strict=True) if header}
        clips = {item: _clips_of(item, header) for item, header in infos.items()}
        check_pairs(clips, infos, manifest, pool)
    broken = tuple(item for item in items if item not in infos)
    if broken:
        names = name_some(item.path.name for item in broken)
        logger.warning("%s: %d files cannot be read and are skipped (%s)", config, len(broken), names)
    _warn_other_rate(config, infos)
    _warn_lost_frames(config, infos)
    found = tuple(clip for of_item in clips.values() for clip in of_item)
    too_short = tuple(item for item, of_item in clips.items() if not of_item)
    if not infos:
        raise InputError(f"{config}: none of {len(items)} files can be read ({name_some(i.path.name for i in broken)})")
    if not found:
        raise InputError(
            f"{config}: no clips: each of {len(infos)} videos is shorter than {min(config.target_frames)} frames"
            f"{_after_rate(config)} ({name_some(item.path.name for item in infos)}): lower target_frames"
        )
    _refuse_long_names(clips)
    return ClipPlan(config, tuple(items), found, too_short, broken, infos)


def warn_too_short(plans: Iterable[ClipPlan]) -> None:
    """Warn about items that give no clip because they are shorter than every target length."""
    for plan in plans:
        if plan.too_short:
            logger.warning(
                "%s: %d of %d videos give no clip: fewer than %d frames%s (%s)",
                plan.config,
                len(plan.too_short),
                len(plan.items),
                min(plan.config.target_frames),
                _after_rate(plan.config),
                name_some(item.path.name for item in plan.too_short),
            )


def name_some(names: Iterable[str]) -> str:
    """Return the first ten names and the number of further ones."""
    known = list(names)
    more = len(known) - _NUM_SHOWN
    return ", ".join(known[:_NUM_SHOWN]) + (f" and {more} more" if more > 0 else "")


def used_frames(config: DatasetConfig, header: MediaInfo) -> tuple[int, ...]:
    """Return the indices of the frames that clips are cut from, after resampling to the rate set by `source_fps`."""
    rate = config.source_fps
    if rate == "auto":
        # An image, or an animation of one frame, has no frame rate.
        if not header.times or header.fps is None:
            return tuple(range(header.num_frames))
        return timed_frames(header.times, target_fps=config.space.fps)
    return kept_frames(header.num_frames, rate, target_fps=config.space.fps)


def _clips_of(item: Item, header: MediaInfo) -> list[Clip]:
    config = item.config
    source_size = (header.width, header.height)
    size = choose_bucket(
        source_size,
        config.resolution,
        enable_bucket=config.enable_bucket,
        no_upscale=config.bucket_no_upscale,
        step=config.space.size_step,
    )
    if min(size) < config.space.size_step:
        raise InputError(
            f"{item.path} is {describe_size(source_size)}: with bucket_no_upscale each side must be"
            f" at least {config.space.size_step}"
        )
    reading = recipe_words(header.reading, config.alpha_background, is_video=config.is_video)
    if not config.is_video:
        return [Clip(item, 0, (0,), size, source_size, reading)]
    kept = used_frames(config, header)
    positions = clip_positions(
        len(kept),
        config.target_frames,
        config.frame_extraction,
        frame_sample=config.frame_sample,
        frame_stride=config.frame_stride,
        max_frames=config.max_frames,
    )
    return [Clip(item, start, kept[start : start + length], size, source_size, reading) for start, length in positions]


def refuse_equal_stems(config: DatasetConfig, paths: Sequence[Path]) -> None:
    """Raise InputError for files whose caches or controls would have the same name."""
    stems = defaultdict(list)
    for path in paths:
        stems[path.stem].append(path)
    clashes = [
        " and ".join(path.name if len({p.parent for p in same}) == 1 else str(path) for path in same)
        for same in stems.values()
        if len(same) > 1
    ]
    if clashes:
        raise InputError(
            f"{config}: files with the same name would share caches in {config.cache_directory} ({name_some(clashes)}):"
            " rename them, or put them in datasets with separate cache folders"
        )


def _refuse_long_names(clips: Mapping[Item, Sequence[Clip]]) -> None:
    """Raise InputError if a cache file's name is too long for the file system of its folder; only the longest is
    checked."""
    names = ((path, item) for item, of_item in clips.items() for path in (text_path(item), *map(latents_path, of_item)))
    longest, item = max(names, key=lambda named: len(os.fsencode(named[0].name)))
    check_name(longest, f"rename {shortened(item.path.name)}, or set cache_directory to another file system")


def _warn_lost_frames(config: DatasetConfig, infos: Mapping[Item, MediaInfo]) -> None:
    """Warn about videos that begin with frames that cannot be decoded."""
    lost = [
        f"{item.path.name} ({info.lost_frames} of {info.num_frames + info.lost_frames})"
        for item, info in infos.items()
        if info.lost_frames
    ]
    if lost:
        logger.warning(
            "%s: %d videos begin in the middle of a GOP; frames that cannot be decoded are left out (%s)",
            config,
            len(lost),
            name_some(lost),
        )


def _after_rate(config: DatasetConfig) -> str:
    return f" at {config.space.fps} fps after source_fps {config.source_fps}" if config.source_fps else ""


def _warn_other_rate(config: DatasetConfig, infos: Mapping[Item, MediaInfo]) -> None:
    """Warn once about files that would play at a different speed because all their frames are used unchanged."""
    stills = config.target_frames == (1,) and config.frame_extraction != "full"
    if not config.is_video or config.source_fps is not None or stills:
        return
    other = [
        f"{item.path.name} ({info.fps:.4g})"
        for item, info in infos.items()
        if info.fps is not None and abs(info.fps - config.space.fps) > _RATE_TOLERANCE
    ]
    if other:
        logger.warning(
            "%s: %d of %d videos are not at %g fps (%s) and all their frames are used, so they play at a different"
            " speed:"
            ' source_fps = "auto" keeps their speed',
            config,
            len(other),
            len(infos),
            config.space.fps,
            name_some(other),
        )
