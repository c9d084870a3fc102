"""Summaries of a dataset for the log and for a LoRA's metadata."""

import json
from collections.abc import Sequence
from typing import Any

from dataset.batching.batches import CachedDataset
from dataset.batching.buckets import describe_size
from dataset.batching.epochs import count_batches, epoch_sizes
from dataset.config import DatasetConfig


def summarise(dataset: CachedDataset) -> str:
    """Return log lines with files, clips and repeats of each dataset, and samples and batches of each bucket."""
    lines = []
    for plan in dataset.plans:
        config, kind = plan.config, "videos" if plan.config.is_video else "images"
        weight = "" if config.weight is None else f", weight {config.weight:g}"
        found = f"{len(plan.items)} {kind}, {len(plan.clips)} clips"
        lines.append(f"{config}: {found}, num_repeats {config.num_repeats}{weight}")
        lines += [
            f"  {describe_size(bucket.size)}, {bucket.num_frames} frames: {size} samples"
            f" in {count_batches(size, config)} batches of {config.batch_size}"
            for bucket, size in epoch_sizes(dataset).items()
            if bucket.dataset == config.number
        ]
    return "\n".join(lines)


def metadata(dataset: CachedDataset, configs: Sequence[DatasetConfig]) -> str:
    """Return JSON for a LoRA's `ss_datasets`: each dataset's settings and sample count, and its folder names without
    paths."""
    return json.dumps([_describe(config, dataset) for config in configs])


def _describe(config: DatasetConfig, dataset: CachedDataset) -> dict[str, Any]:
    shared = {
        "resolution": config.resolution,
        "caption_extension": config.caption_extension,
        "batch_size_per_device": config.batch_size,
        "num_repeats": config.num_repeats,
        "enable_bucket": config.enable_bucket,
        "bucket_no_upscale": config.bucket_no_upscale,
        "cache_directory": config.cache_directory.name,
        "num_train_items": sum(
            size for bucket, size in epoch_sizes(dataset).items() if bucket.dataset == config.number
        ),
    }
    source = _describe_source(config)
    if not config.is_video:
        return {**source, **shared}
    return {
        **source,
        **shared,
        "target_frames": config.target_frames,
        "frame_extraction": config.frame_extraction,
        "frame_sample": config.frame_sample,
        "frame_stride": config.frame_stride,
        "max_frames": config.max_frames,
        "source_fps": config.source_fps,
    }


def _describe_source(config: DatasetConfig) -> dict[str, str]:
    kind = "video" if config.is_video else "image"
    if config.listing is None:
        return {f"{kind}_directory": config.directory.name}
    table = "csv" if config.listing.suffix.lower() == ".csv" else "jsonl"
    return {f"{kind}_{table}_file": config.listing.name}
