"""Settings that name the data: shared by both cache tools and by training."""

from dataclasses import dataclass

from wan_train.cli import option


@dataclass(frozen=True)
class DatasetSettings:
    """Data."""

    dataset_config: str = option(
        "",
        "TOML file with [general] and one [[datasets]] for each folder, or JSON with the same keys.",
        required=True,
        metavar="TOML",
    )
    allow_missing_captions: bool = option(False, "Take empty text for a file without a caption, in place of an error.")
    skip_broken: bool = option(
        False, "Name files that cannot be read or decoded and go on without them, in place of an error."
    )


@dataclass(frozen=True)
class CacheReadSettings:
    """Caches."""

    trust_cache: bool = option(
        False,
        "Train on all that the cache folders hold, as it is, without the sources: they need not be there and are not"
        " compared.",
    )
