"""Settings of `wan_train_network.py`."""

from dataclasses import dataclass

from dataset.settings import CacheReadSettings, DatasetSettings
from networks.settings import NetworkSettings
from wan_train.cli import Tool, option
from wan_train.memory.settings import CompileSettings, RecomputeSettings, StreamSettings, WeightSettings
from wan_train.models.settings import DitSettings, TextEncoderSettings, VaeSettings

MIXED_PRECISIONS = ("no", "fp16", "bf16")
SAVE_PRECISIONS = ("float", "fp32", "fp16", "bf16")
TIMESTEP_SAMPLINGS = ("uniform", "sigmoid", "shift")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


@dataclass(frozen=True)
class LoopSettings:
    """Training loop."""

    max_train_steps: int = option(1600, "Optimizer steps to take.", minimum=1)
    max_train_epochs: int | None = option(None, "Epochs to train; overrides --max_train_steps.", minimum=1)
    gradient_accumulation_steps: int = option(1, "Batches per optimizer step.", minimum=1)
    max_grad_norm: float = option(1.0, "Clip the gradient to this norm; 0 does not clip.", minimum=0)
    mixed_precision: str | None = option(
        None, "Precision of the frozen model; without it the launcher's, or none.", choices=MIXED_PRECISIONS
    )
    seed: int | None = option(
        None, "Seed of noise, timesteps, order and LoRA; without it one is drawn and printed.", minimum=0
    )
    max_data_loader_n_workers: int = option(8, "Processes that read batches; 0 reads in the trainer.", minimum=0)
    persistent_data_loader_workers: bool = option(False, "Keep the readers between epochs.")


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer."""

    optimizer_type: str = option("AdamW", "AdamW, AdamW8bit or the name of any torch.optim class.")
    optimizer_args: tuple[str, ...] = option((), "Further arguments of the optimizer, name=value.")
    learning_rate: float = option(2e-6, "Learning rate.", minimum=0)
    lr_scheduler: str = option("constant", "How the learning rate goes after the warm-up.", choices=SCHEDULES)
    lr_warmup_steps: str = option("0", "Steps of linear warm-up: a number, a share below 1, or a percentage like 5%.")


@dataclass(frozen=True)
class TimestepSettings:
    """Noise levels."""

    timestep_sampling: str = option("uniform", "How noise levels are drawn.", choices=TIMESTEP_SAMPLINGS)
    discrete_flow_shift: float = option(1.0, "Shift towards noise, for shift.", flags=("--flow_shift",), minimum=1e-3)
    sigmoid_scale: float = option(1.0, "Width of the distribution, for sigmoid and shift.", minimum=1e-3)


@dataclass(frozen=True)
class SaveSettings:
    """Saving."""

    output_dir: str = option("", "Folder for everything that the run writes.", required=True)
    output_name: str = option("", "Name of the LoRA file.", required=True)
    save_every_n_epochs: int | None = option(None, "Save after every N epochs.", minimum=1)
    save_every_n_steps: int | None = option(None, "Save after every N optimizer steps.", minimum=1)
    save_precision: str = option("float", "Precision of the saved LoRA.", choices=SAVE_PRECISIONS)
    no_metadata: bool = option(False, "Save only the metadata that loading needs.")
    training_comment: str | None = option(None, "A remark for the metadata.")
    metadata_title: str | None = option(None, "Title for the metadata; without it the output name.")
    metadata_author: str | None = option(None, "Author for the metadata.")
    metadata_description: str | None = option(None, "Description for the metadata.")
    metadata_license: str | None = option(None, "Licence for the metadata.")
    metadata_tags: str | None = option(None, "Tags for the metadata, between commas.")


@dataclass(frozen=True)
class PreviewSettings:
    """Previews."""

    sample_prompts: str | None = option(None, "Text file of prompts, one to a line: words --w 832 --h 480 --f 81 ...")
    sample_every_n_epochs: int | None = option(None, "Make previews after every N epochs.", minimum=1)
    sample_every_n_steps: int | None = option(None, "Make previews after every N optimizer steps.", minimum=1)
    sample_at_first: bool = option(False, "Make previews before the first step too.")


@dataclass(frozen=True)
class LogSettings:
    """Logs."""

    logging_dir: str | None = option(None, "Folder for TensorBoard; without it OUTPUT_DIR/logs.")
    log_with: str = option("tensorboard", "Where curves go beside NAME.metrics.jsonl.", choices=("tensorboard", "none"))


@dataclass(frozen=True)
class TrainSettings:
    """All settings of the trainer."""

    dit: DitSettings
    weights: WeightSettings
    stream: StreamSettings
    activations: RecomputeSettings
    compile: CompileSettings
    vae: VaeSettings
    text: TextEncoderSettings
    data: DatasetSettings
    caches: CacheReadSettings
    network: NetworkSettings
    loop: LoopSettings
    optimizer: OptimizerSettings
    timesteps: TimestepSettings
    save: SaveSettings
    preview: PreviewSettings
    logs: LogSettings


TOOL = Tool(
    "wan_train_network.py",
    "Train a LoRA on a Wan model; start it with accelerate launch.",
    TrainSettings,
    "wan_train.training.main:main",
)
