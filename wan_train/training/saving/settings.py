"""Settings of saving and resuming."""

import re
from dataclasses import dataclass
from pathlib import Path

from wan_train.cli import option
from wan_train.errors import InputError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
SAVE_PRECISIONS = ("float", "fp32", "fp16", "bf16")


@dataclass(frozen=True)
class SaveSettings:
    """Saving."""

    output_dir: str = option(
        "",
        "Folder for everything that the run writes, or a URL that fsspec takes, such as gs://bucket/folder or"
        " s3://bucket/folder.",
        required=True,
    )
    output_name: str = option(
        "", "Name of the saved LoRA or checkpoint, and prefix of the run's other files.", required=True
    )
    local_output_dir: str | None = option(
        None,
        "With a remote --output_dir, local folder in which its files are written first, and stay; default: a folder for"
        " that URL in ~/.cache/wan-train/remote.",
        metavar="FOLDER",
    )
    save_every_n_epochs: int | None = option(None, "Save every N epochs.", minimum=1)
    save_every_n_steps: int | None = option(None, "Save every N optimizer steps.", minimum=1)
    save_last_n_epochs: int | None = option(None, "Keep only the files of the last N saved epochs.", minimum=1)
    save_last_n_steps: int | None = option(None, "Keep only the files of the last N steps.", minimum=1)
    save_state: bool = option(False, "Save the training state for --resume with each checkpoint.")
    save_state_on_train_end: bool = option(False, "Save the training state at the end.")
    save_last_n_epochs_state: int | None = option(
        None, "Keep only the states of the last N saved epochs; default: as --save_last_n_epochs.", minimum=1
    )
    save_last_n_steps_state: int | None = option(
        None, "Keep only the states of the last N steps; default: as --save_last_n_steps.", minimum=1
    )
    resume: str | None = option(
        None,
        "State folder to resume from, or its URL; auto: the newest of the last run of this name, if there is one.",
    )
    resume_anyway: bool = option(False, "Resume even if the configuration or dataset differs from that of the state.")
    save_precision: str = option("float", "Data type of the saved LoRA or checkpoint.", choices=SAVE_PRECISIONS)
    max_shard_size: str | None = option(
        None,
        "With networks.full, maximum size of each file of a sharded checkpoint, such as 10GB or 500MB; "
        "default: one file.",
    )
    no_metadata: bool = option(False, "Save only the metadata that loading needs.")
    training_comment: str | None = option(None, "Comment for the metadata.")
    metadata_title: str | None = option(None, "Title for the metadata; default: --output_name.")
    metadata_author: str | None = option(None, "Author for the metadata.")
    metadata_description: str | None = option(None, "Description for the metadata.")
    metadata_license: str | None = option(None, "License for the metadata.")
    metadata_tags: str | None = option(None, "Comma-separated tags for the metadata.")
    metadata_reso: str | None = option(
        None, "Resolution for the metadata; default: the task's.", metavar="WIDTHxHEIGHT"
    )
    metadata_arch: str | None = option(
        None, "Architecture for the metadata; default: wan2.1 or wan2.2 by the task, with /lora for a LoRA."
    )

    def __post_init__(self) -> None:
        if self.max_shard_size is not None and not self.shard_bytes:
            raise InputError(f"--max_shard_size {self.max_shard_size!r} is not a size: give one like 10GB or 500MB")

    @property
    def metrics_path(self) -> Path:
        """The metrics file, with a row for each step."""
        return Path(self.output_dir) / f"{self.output_name}.metrics.jsonl"

    @property
    def shard_bytes(self) -> int | None:
        """`--max_shard_size` in bytes: GB is 1000^3 bytes, GiB is 1024^3."""
        if self.max_shard_size is None:
            return None
        match = _SIZE.fullmatch(self.max_shard_size.strip())
        if match is None:
            return 0
        number, letter, binary = match.groups()
        return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(letter.lower() or " "))
