"""Settings of what a run saves and of what it goes on from."""

from dataclasses import dataclass

from wan_train.cli import option

SAVE_PRECISIONS = ("float", "fp32", "fp16", "bf16")


@dataclass(frozen=True)
class SaveSettings:
    """Saving."""

    output_dir: str = option("", "Folder for everything that the run writes.", required=True)
    output_name: str = option("", "Name of the LoRA file.", required=True)
    save_every_n_epochs: int | None = option(None, "Save after every N epochs.", minimum=1)
    save_every_n_steps: int | None = option(None, "Save after every N optimizer steps.", minimum=1)
    save_last_n_epochs: int | None = option(None, "Keep the files of the last N saved epochs only.", minimum=1)
    save_last_n_steps: int | None = option(None, "Keep the files of the last N steps only.", minimum=1)
    save_state: bool = option(False, "Save, with each file, all that it takes to go on from there.")
    save_state_on_train_end: bool = option(False, "Save a state at the end.")
    save_last_n_epochs_state: int | None = option(
        None, "Keep the states of the last N saved epochs only; without it as many as files.", minimum=1
    )
    save_last_n_steps_state: int | None = option(
        None, "Keep the states of the last N steps only; without it as many as files.", minimum=1
    )
    resume: str | None = option(None, "State folder to go on from; auto is the newest of this output, if there is one.")
    resume_anyway: bool = option(False, "Go on from a state of another configuration.")
    save_precision: str = option("float", "Precision of the saved LoRA.", choices=SAVE_PRECISIONS)
    no_metadata: bool = option(False, "Save only the metadata that loading needs.")
    training_comment: str | None = option(None, "A remark for the metadata.")
    metadata_title: str | None = option(None, "Title for the metadata; without it the output name.")
    metadata_author: str | None = option(None, "Author for the metadata.")
    metadata_description: str | None = option(None, "Description for the metadata.")
    metadata_license: str | None = option(None, "Licence for the metadata.")
    metadata_tags: str | None = option(None, "Tags for the metadata, between commas.")
    metadata_reso: str | None = option(
        None, "Resolution for the metadata; without it the task's.", metavar="WIDTHxHEIGHT"
    )
    metadata_arch: str | None = option(None, "Architecture for the metadata; without it wan2.1/lora.")
