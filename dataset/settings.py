"""Dataset options shared by both caching scripts and by training."""

from dataclasses import dataclass

from wan_train.cli import option


@dataclass(frozen=True)
class DatasetSettings:
    """Data."""

    dataset_config: str = option(
        "",
        "TOML file with [general] and one [[datasets]] per folder, or JSON with the same keys.",
        required=True,
        metavar="TOML",
    )
    allow_missing_captions: bool = option(
        False, "Use an empty caption for files without one instead of raising an error."
    )
    skip_broken: bool = option(
        False, "Skip files that cannot be read or decoded, with a warning, instead of raising an error."
    )


@dataclass(frozen=True)
class CacheReadSettings:
    """Caches."""

    trust_cache: bool = option(
        False,
        "Train on everything in the cache folders without comparing it with the source files, which may be absent.",
    )
