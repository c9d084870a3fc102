"""Check from headers, before a model is loaded, that controls, masks and camera paths match their clips."""

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor

from dataset.batching.buckets import describe_size
from dataset.caching.manifest import Manifest
from dataset.items import Clip, Item
from dataset.reading.info import MediaInfo
from dataset.reading.media import is_video
from dataset.reading.probes import recall_header
from wan_train.conditions.camera import read_camera_file
from wan_train.errors import InputError

_SAME_ASPECT = 0.02  # relative difference of aspect ratios up to which a control is accepted
_ENTRIES = "camera entries"


def check_pairs(
    clips: Mapping[Item, Sequence[Clip]], infos: Mapping[Item, MediaInfo], manifest: Manifest, pool: Executor
) -> None:
    """Raise InputError for the first pair of files that do not match; items without clips are skipped.

    A control video or VACE mask must have at least as many frames as the clips use, and the aspect ratio of its media
    file within 2%; a camera file needs at least as many entries; a reference must be readable. Datasets for models that
    read none of them are not checked.
    """
    found = [(item, of_item) for item, of_item in clips.items() if of_item and item.config.control is not None]
    check = functools.partial(_find_misfit, infos=infos, manifest=manifest)
    misfits = [misfit for misfit in pool.map(lambda pair: check(*pair), found) if misfit]
    if misfits:
        more = f" (and {len(misfits) - 1} more pairs)" if len(misfits) > 1 else ""
        raise InputError(f"{misfits[0]}{more}")


def _find_misfit(item: Item, clips: Sequence[Clip], *, infos: Mapping[Item, MediaInfo], manifest: Manifest) -> str:
    """Return how an item's accompanying files do not match it, or "" if they do."""
    needed = 1 + max(index for clip in clips for index in clip.frames)
    source, control = infos[item], item.config.control
    assert control is not None
    for path in item.references:
        recall_header(path, manifest)
    beside = item.controls[:1] if control.video or control.vace else ()
    if control.vace and item.vace_mask:
        beside += (item.vace_mask,)
    for path in beside:
        header = recall_header(path, manifest)
        assert header is not None
        # A still mask applies to every frame.
        if header.num_frames < needed and (path != item.vace_mask or is_video(path)):
            return (
                f"{path} has {header.num_frames} frames, but the clips of {item.path} use {needed} of its"
                f" {source.num_frames}: extend it to that length, or lower target_frames"
            )
        if abs(header.width * source.height / (header.height * source.width) - 1) > _SAME_ASPECT:
            sizes = describe_size((header.width, header.height)), describe_size((source.width, source.height))
            return f"{path} is {sizes[0]} and {item.path} is {sizes[1]}: use the same aspect ratio for both"
    return _find_camera_misfit(item, needed, manifest) if control.camera else ""


def _find_camera_misfit(item: Item, needed: int, manifest: Manifest) -> str:
    path = item.camera.path if item.camera else None
    if path is None:
        return ""
    num_entries = manifest.recall(_ENTRIES, path, lambda file: len(read_camera_file(file)))
    if num_entries >= needed:
        return ""
    return (
        f"{path} has {num_entries} camera entries, but the clips of {item.path} use {needed} frames: give it a line"
        " for each frame, or lower target_frames"
    )
