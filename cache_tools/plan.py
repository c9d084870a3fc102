"""The result that caching would have for each file, as a table and as JSON; no model is needed."""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cache_tools.plan_partners import PartnersPlan, describe_partners
from dataset.batching.batches import Bucket, CachedDataset
from dataset.batching.buckets import Size
from dataset.batching.epochs import count_batches, epoch_sizes
from dataset.config import DatasetConfig
from dataset.items import Clip, Item
from dataset.reading.info import MediaInfo, plan_words
from dataset.reading.unread import UnreadFile, find_unread
from dataset.sources import ClipPlan, name_some, used_frames
from wan_train.storage import replacing

_VERSION = 1
_NAME_WIDTH = 25  # 80 characters per line with the other columns


@dataclass(frozen=True)
class FilePlan:
    """The planned clips of a file; rates in frames per second, None for an image. `why` explains the lost seconds.

    `frames_lost` are stored but cannot be decoded, `reading` is `MediaInfo.reading`, and `partners` are the
    accompanying files.
    """

    path: str
    fps_in: float | None
    fps_out: float | None
    frames: int
    frames_at_rate: int
    clips: int
    bucket: Size | None
    seconds: float
    seconds_used: float
    why: str
    frames_lost: int = 0
    reading: tuple[str, ...] = ()
    partners: PartnersPlan = field(default_factory=PartnersPlan)

    @property
    def seconds_lost(self) -> float:
        """Seconds that are not part of any clip."""
        return self.seconds - self.seconds_used


@dataclass(frozen=True)
class BucketPlan:
    """The clips of one size (width, height) and length, with the samples and batches that they give per epoch."""

    size: Size
    frames: int
    clips: int
    samples: int
    batches: int


@dataclass(frozen=True)
class DatasetPlan:
    """The planned clips of a dataset; `empty_targets` are lengths that no file reaches, `model_fps` the model's frame
    rate.

    `unread` are the ignored files of its folder; `reading` maps descriptions of pixel processing to the names of the
    files.
    """

    number: int
    name: str
    batch_size: int
    files: tuple[FilePlan, ...]
    buckets: tuple[BucketPlan, ...]
    empty_targets: tuple[int, ...]
    model_fps: int
    unread: tuple[UnreadFile, ...] = ()
    reading: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def describe_plans(plans: Sequence[ClipPlan]) -> list[DatasetPlan]:
    """Return the plan of each dataset; the samples of an epoch are those of training."""
    sizes = epoch_sizes(CachedDataset(plans))
    return [_describe_plan(plan, sizes) for plan in plans]


def _describe_plan(plan: ClipPlan, sizes: Mapping[Bucket, int]) -> DatasetPlan:
    config = plan.config
    by_item: dict[Item, list[Clip]] = defaultdict(list)
    for clip in plan.clips:
        by_item[clip.item].append(clip)
    described = ((_describe_file(item, by_item[item], plan.infos.get(item)), item) for item in plan.items)
    files = tuple(replace(file, partners=describe_partners(item)) for file, item in described)
    counts = Counter((clip.size, clip.num_frames) for clip in plan.clips)
    buckets = []
    for (size, frames), count in sorted(counts.items()):
        # Samples with different conditions form separate batches.
        samples = [number for bucket, number in sizes.items() if bucket[:3] == (config.number, size, frames)]
        num_batches = sum(count_batches(number, config) for number in samples)
        buckets.append(BucketPlan(size, frames, count, sum(samples), num_batches))
    wanted = () if config.frame_extraction == "full" or not config.is_video else config.target_frames
    empty = tuple(frames for frames in wanted if frames not in {frames for _, frames in counts})
    unread = find_unread(config, [item.path for item in plan.items])
    return DatasetPlan(
        config.number,
        str(config),
        config.batch_size,
        files,
        tuple(buckets),
        empty,
        config.space.fps,
        tuple(unread),
        _describe_reading(plan),
    )


def _describe_reading(plan: ClipPlan) -> dict[str, tuple[str, ...]]:
    """Return the names of the files whose pixels are processed, by the description of the processing."""
    found: dict[str, list[str]] = defaultdict(list)
    for item, info in plan.infos.items():
        for word in info.reading:
            if told := plan_words(word, plan.config.alpha_background):
                found[told].append(item.path.name)
    return {told: tuple(names) for told, names in found.items()}


def _describe_file(item: Item, clips: Sequence[Clip], info: MediaInfo | None) -> FilePlan:
    if info is None:
        return FilePlan(str(item.path), None, None, 0, 0, 0, None, 0.0, 0.0, "cannot be read")
    bucket = clips[0].size if clips else None
    if not item.config.is_video:
        return FilePlan(str(item.path), None, None, 1, 1, len(clips), bucket, 0.0, 0.0, "", 0, info.reading)
    kept = len(used_frames(item.config, info))
    shown = len({number for clip in clips for number in range(clip.start, clip.start + clip.num_frames)})
    seconds = info.times[-1] if info.times else info.num_frames / info.fps if info.fps else 0.0
    return FilePlan(
        str(item.path),
        info.fps,
        _rate_out(item.config, info.fps),
        info.num_frames,
        kept,
        len(clips),
        bucket,
        seconds,
        seconds * shown / kept if kept else 0.0,
        "" if shown == kept else _why_lost(item.config, kept, num_clips=len(clips)),
        info.lost_frames,
        info.reading,
    )


def _rate_out(config: DatasetConfig, fps: float | None) -> float | None:
    """Return the number of clip frames per second of the file."""
    if config.source_fps == "auto":
        return float(config.space.fps)
    if fps is None or config.source_fps is None:
        return fps
    return fps * min(1.0, config.space.fps / float(config.source_fps))


def _why_lost(config: DatasetConfig, num_frames: int, *, num_clips: int) -> str:
    if not num_clips:
        return f"shorter than {min(config.target_frames)} frames"
    match config.frame_extraction:
        case "head":
            return "head uses the start only"
        case "uniform":
            return "between and around the samples"
        case "full":
            return "after max_frames" if num_frames > config.max_frames else "clip lengths are 4n+1"
    return "the remainder at the end is too short"


def total(datasets: Sequence[DatasetPlan]) -> dict[str, Any]:
    """Return sums over all datasets; `coverage` is the share of the footage that is part of a clip, None without
    videos."""
    files = [file for dataset in datasets for file in dataset.files]
    buckets = [bucket for dataset in datasets for bucket in dataset.buckets]
    seconds, used = sum(file.seconds for file in files), sum(file.seconds_used for file in files)
    return {
        "files": len(files),
        "files_without_clips": sum(not file.clips for file in files),
        "clips": sum(bucket.clips for bucket in buckets),
        "samples": sum(bucket.samples for bucket in buckets),
        "batches": sum(bucket.batches for bucket in buckets),
        "seconds": seconds,
        "seconds_used": used,
        "coverage": used / seconds if seconds else None,
    }


def format_json(datasets: Sequence[DatasetPlan]) -> str:
    """Return the plans as JSON."""
    listed = [
        {
            **asdict(dataset),
            "files": [{**asdict(file), "seconds_lost": file.seconds_lost} for file in dataset.files],
            "unread": [{"path": str(file.path), "reason": file.reason} for file in dataset.unread],
        }
        for dataset in datasets
    ]
    return json.dumps({"version": _VERSION, "datasets": listed, "total": total(datasets)}, indent=1)


def format_table(datasets: Sequence[DatasetPlan]) -> str:
    """Return the plans as a table, at most 80 characters wide except for lists of names."""
    sums = total(datasets)
    lines = [line for dataset in datasets for line in (*_format_dataset(dataset), "")]
    counts = f"{sums['files']} files, {sums['clips']} clips, {sums['samples']} samples in {sums['batches']} batches"
    lines.append(f"total: {counts} per epoch")
    if sums["coverage"] is not None:
        used = f"{sums['seconds_used']:.1f} of {sums['seconds']:.1f} s"
        lines.append(f"footage covered by clips: {used}, {100 * sums['coverage']:.0f}%")
    return "\n".join(lines)


def _format_dataset(dataset: DatasetPlan) -> list[str]:
    titles = _row("file", "fps in > out", "frames", "clips", "w x h", "used s", "lost s")
    lines = [dataset.name, titles, *map(_format_file, dataset.files)]
    lines += [f"with {Path(file.path).name}: {file.partners}" for file in dataset.files if str(file.partners)]
    lost: dict[str, float] = defaultdict(float)
    for file in dataset.files:
        lost[file.why] += file.seconds_lost if file.clips else 0
    lines += [f"lost {seconds:.1f} s: {why}" for why, seconds in lost.items() if seconds]
    nothing = [f"{Path(file.path).name} ({file.why})" for file in dataset.files if not file.clips]
    if nothing:
        lines.append(f"no clips from {len(nothing)} of {len(dataset.files)} files: {name_some(nothing)}")
    if dataset.empty_targets:
        lines.append(f"no file is long enough for these target_frames: {', '.join(map(str, dataset.empty_targets))}")
    lines += _format_rates(dataset.files, dataset.model_fps)
    lines += _format_reading(dataset)
    lines.append(f"{'bucket w x h':<15}{'frames':>8}{'clips':>8}{'samples':>9}  batches of {dataset.batch_size}")
    for bucket in dataset.buckets:
        empty = "" if bucket.batches else "  fewer than a batch: dropped by drop_last"
        size = f"{bucket.size[0]} x {bucket.size[1]}"
        lines.append(f"{size:<15}{bucket.frames:>8}{bucket.clips:>8}{bucket.samples:>9}{bucket.batches:>9}{empty}")
    return lines


def _format_rates(files: Sequence[FilePlan], model_fps: int) -> list[str]:
    lines = []
    if dropped := sum(max(file.frames - file.frames_at_rate, 0) for file in files):
        lines.append(f"source_fps drops {dropped} of {sum(file.frames for file in files)} frames")
    other = [Path(f.path).name for f in files if f.fps_out and f.frames > 1 and abs(f.fps_out - model_fps) > 0.1]
    if other:
        lines.append(f"not at {model_fps} fps, so they play at a different speed: {name_some(other)}")
    return lines


def _format_reading(dataset: DatasetPlan) -> list[str]:
    num_files = len(dataset.files)
    lines = [
        f"{told}: {len(names)} of {num_files} files: {name_some(names)}" for told, names in dataset.reading.items()
    ]
    if undecoded := [f"{Path(file.path).name} ({file.frames_lost})" for file in dataset.files if file.frames_lost]:
        lines.append(f"begin in the middle of a GOP, frames that cannot be decoded: {name_some(undecoded)}")
    if dataset.unread:
        lines.append(f"ignored: {len(dataset.unread)} files: {name_some(map(str, dataset.unread))}")
    return lines


def _format_file(file: FilePlan) -> str:
    rates = "" if file.fps_in is None else f"{file.fps_in:.4g} > {file.fps_out or 0:.4g}"
    size = f"{file.bucket[0]} x {file.bucket[1]}" if file.bucket else "-"
    seconds = (f"{file.seconds_used:.1f}", f"{file.seconds_lost:.1f}") if file.seconds else ("", "")
    return _row(Path(file.path).name, rates, str(file.frames), str(file.clips), size, *seconds)


def _row(name: str, rates: str, frames: str, clips: str, size: str, *seconds: str) -> str:
    short = name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH // 2]}…{name[-(_NAME_WIDTH // 2) :]}"
    return f"{short:<{_NAME_WIDTH}}{rates:>14}{frames:>7}{clips:>6}{size:>12}{seconds[0]:>8}{seconds[1]:>8}".rstrip()


def show_plan(plans: Sequence[ClipPlan], json_path: str) -> None:
    """Print the table; with `json_path`, write JSON to that file, or with "-" print it instead of the table."""
    datasets = describe_plans(plans)
    if json_path == "-":
        print(format_json(datasets))
        return
    if json_path:
        with replacing(json_path) as temporary:
            temporary.write_text(format_json(datasets) + "\n", encoding="utf-8")
    sys.stdout.write(format_table(datasets) + "\n")
