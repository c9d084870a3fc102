"""Settings of what a training run shows of itself, and where."""

from dataclasses import dataclass

from wan_train.cli import option
from wan_train.sampling.settings import PromptSettings

LOG_TARGETS = ("auto", "tensorboard", "wandb", "all", "none")
HUB_REPOSITORIES = ("model", "dataset")


@dataclass(frozen=True)
class PreviewSettings(PromptSettings):
    """Previews."""

    sample_prompts: str | None = option(
        None,
        "File of prompts: text with one to a line, words --w 832 --h 480 --f 81 ..., or .toml, or .json. Default of a"
        " line: 256x256, 1 frame, 20 steps, and the task's shift and guidance.",
    )
    sample_every_n_epochs: int | None = option(None, "Make previews after every N epochs.", minimum=1)
    sample_every_n_steps: int | None = option(None, "Make previews after every N optimizer steps.", minimum=1)
    sample_at_first: bool = option(False, "Make previews before the first step too.")
    sample_with_ema: bool = option(False, "Make previews with the average of --ema_decay in place of the last weights.")


@dataclass(frozen=True)
class LogSettings:
    """Logs."""

    logging_dir: str | None = option(None, "Folder for TensorBoard and W&B; without it OUTPUT_DIR/logs.")
    log_with: str = option(
        "auto",
        "Where curves go beside NAME.metrics.jsonl; auto is TensorBoard where it is installed, all is both.",
        choices=LOG_TARGETS,
    )
    log_prefix: str | None = option(None, "First part of the name of TensorBoard's folder, before the output name.")
    log_tracker_name: str = option("network_train", "Name of the W&B project.")
    log_tracker_config: str | None = option(
        None, "TOML file whose tables, [wandb] and [tensorboard], are further arguments of wandb.init, SummaryWriter."
    )
    wandb_run_name: str | None = option(None, "Name of the run in W&B; without it the output name.")
    wandb_api_key: str | None = option(None, "Key for W&B; better in the environment variable WANDB_API_KEY.")
    log_config: bool = option(False, "Show the settings of the run beside its curves.")


@dataclass(frozen=True)
class HubSettings:
    """Hugging Face Hub."""

    huggingface_repo_id: str | None = option(None, "Repository, OWNER/NAME, that gets a copy of each saved file.")
    huggingface_repo_type: str = option("model", "Kind of that repository.", choices=HUB_REPOSITORIES)
    huggingface_path_in_repo: str = option("", "Folder in it.")
    huggingface_token: str | None = option(None, "Token for it; without it HF_TOKEN or the one of a login.")
    huggingface_repo_visibility: str = option(
        "private", "Who sees it, if it is made now.", choices=("private", "public")
    )
    save_state_to_huggingface: bool = option(False, "Upload states too.")
    resume_from_huggingface: bool = option(
        False,
        "Take --resume as REPO_ID/PATH_IN_REPO:REVISION:REPO_TYPE, a state on the hub; the last two may be left out.",
    )
    async_upload: bool = option(False, "Upload while training goes on; several processes always do.")
