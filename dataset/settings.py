"""Settings that name the data: shared by both cache tools and by training."""

from dataclasses import dataclass

from wan_train.cli import option


@dataclass(frozen=True)
class DatasetSettings:
    """Data."""

    dataset_config: str = option(
        "", "TOML file with [general] and one [[datasets]] for each folder.", required=True, metavar="TOML"
    )
    allow_missing_captions: bool = option(False, "Take empty text for a file without a caption, in place of an error.")
