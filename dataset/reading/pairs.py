"""Whether the controls, masks and camera paths of clips go with them: found from headers, before a model is loaded."""

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

_SAME_ASPECT = 0.02  # the share by which two aspect ratios may differ and a control is fitted all the same
_ENTRIES = "camera entries"


def check_pairs(
    clips: Mapping[Item, Sequence[Clip]], infos: Mapping[Item, MediaInfo], manifest: Manifest, pool: Executor
) -> None:
    """Raise InputError for the first pair of files that do not go together; items without clips are skipped.

    A control video or VACE mask has at least the frames that the clips take, and the aspect ratio of its file within
    2%; a camera file has at least as many entries; a reference can be read. Nothing is checked of a dataset for a model
    that reads none of them.
    """
    found = [(item, of_item) for item, of_item in clips.items() if of_item and item.config.control is not None]
    check = functools.partial(_find_misfit, infos=infos, manifest=manifest)
    misfits = [misfit for misfit in pool.map(lambda pair: check(*pair), found) if misfit]
    if misfits:
        more = f" (and {len(misfits) - 1} more pairs)" if len(misfits) > 1 else ""
        raise InputError(f"{misfits[0]}{more}")


def _find_misfit(item: Item, clips: Sequence[Clip], *, infos: Mapping[Item, MediaInfo], manifest: Manifest) -> str:
    """What of an item does not go with it, in words; nothing where all does."""
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
        # A still mask is that of every frame.
        if header.num_frames < needed and (path != item.vace_mask or is_video(path)):
            return (
                f"{path} has {header.num_frames} frames, and the clips of {item.path} take {needed} of its"
                f" {source.num_frames}: make it as long, or lower target_frames"
            )
        if abs(header.width * source.height / (header.height * source.width) - 1) > _SAME_ASPECT:
            sizes = describe_size((header.width, header.height)), describe_size((source.width, source.height))
            return f"{path} is {sizes[0]} and {item.path} is {sizes[1]}: give them one aspect ratio"
    return _find_camera_misfit(item, needed, manifest) if control.camera else ""


def _find_camera_misfit(item: Item, needed: int, manifest: Manifest) -> str:
    path = item.camera.path if item.camera else None
    if path is None:
        return ""
    num_entries = manifest.recall(_ENTRIES, path, lambda file: len(read_camera_file(file)))
    if num_entries >= needed:
        return ""
    return (
        f"{path} has {num_entries} camera entries, and the clips of {item.path} take {needed} frames: give it a line"
        " for each frame, or lower target_frames"
    )
