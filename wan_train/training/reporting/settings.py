"""Settings of previews, logs and uploads."""

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
        "Prompt file for previews: text with one prompt per line, words --w 832 --h 480 --f 81 ..., or .toml "
        "or .json. Defaults of a prompt: 256x256, 1 frame, 20 steps, and the task's shift and guidance.",
    )
    sample_every_n_epochs: int | None = option(None, "Generate previews every N epochs.", minimum=1)
    sample_every_n_steps: int | None = option(None, "Generate previews every N optimizer steps.", minimum=1)
    sample_at_first: bool = option(False, "Generate previews before the first step.")
    sample_with_ema: bool = option(False, "Generate previews with the EMA weights of --ema_decay.")


@dataclass(frozen=True)
class LogSettings:
    """Logs."""

    logging_dir: str | None = option(None, "Folder for TensorBoard and W&B logs; default: OUTPUT_DIR/logs.")
    log_with: str = option(
        "auto",
        "Trackers besides NAME.metrics.jsonl; auto is TensorBoard if it is installed, all is both.",
        choices=LOG_TARGETS,
    )
    log_prefix: str | None = option(None, "Prefix of the name of the TensorBoard folder.")
    log_tracker_name: str = option("network_train", "W&B project name.")
    log_tracker_config: str | None = option(
        None, "TOML file with tables [wandb] and [tensorboard] of additional arguments of wandb.init and SummaryWriter."
    )
    wandb_run_name: str | None = option(None, "W&B run name; default: --output_name.")
    wandb_api_key: str | None = option(None, "W&B API key; the environment variable WANDB_API_KEY is safer.")
    log_config: bool = option(False, "Log the settings of the run to the trackers.")


@dataclass(frozen=True)
class HubSettings:
    """Hugging Face Hub."""

    huggingface_repo_id: str | None = option(None, "Hugging Face repository, OWNER/NAME, to upload each saved file to.")
    huggingface_repo_type: str = option("model", "Type of the repository.", choices=HUB_REPOSITORIES)
    huggingface_path_in_repo: str = option("", "Folder in the repository.")
    huggingface_token: str | None = option(None, "Hugging Face token; default: HF_TOKEN or the stored login.")
    huggingface_repo_visibility: str = option(
        "private", "Visibility of the repository if it is created.", choices=("private", "public")
    )
    save_state_to_huggingface: bool = option(False, "Upload states too.")
    resume_from_huggingface: bool = option(
        False,
        "Read --resume as REPO_ID/PATH_IN_REPO:REVISION:REPO_TYPE, a state on the hub; the last two are optional.",
    )
    async_upload: bool = option(False, "Upload in the background; always on with several processes.")
