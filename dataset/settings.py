"""Dataset options shared by both caching scripts and by training."""

from dataclasses import dataclass

from wan_train.cli import option


@dataclass(frozen=True)
class DatasetSettings:
    """Data."""

    dataset_config: str = option(
        "",
        "TOML dataset config with [general] and one [[datasets]] table per folder, or JSON with the same keys.",
        required=True,
        metavar="TOML",
    )
    allow_missing_captions: bool = option(False, "Use an empty caption for files that have none instead of stopping.")
    skip_broken: bool = option(False, "Skip files that cannot be read or decoded, with a warning, instead of stopping.")


@dataclass(frozen=True)
class CacheReadSettings:
    """Caches."""

    trust_cache: bool = option(
        False,
        "Train on everything in the cache folders without checking it against the source media, which need not be"
        " present.",
    )
