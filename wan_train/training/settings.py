"""Settings of `wan_train_network.py`."""

from dataclasses import dataclass

from dataset.settings import CacheReadSettings, DatasetSettings
from networks.settings import NetworkSettings
from wan_train.cli import Tool, option
from wan_train.errors import InputError
from wan_train.models.settings import (
    DitSettings,
    ImageEncoderSettings,
    InitSettings,
    TextEncoderSettings,
    VaeSettings,
)
from wan_train.placement.settings import CompileSettings, RecomputeSettings, StreamSettings
from wan_train.profiling.settings import ProfileSettings
from wan_train.quantization.settings import WeightSettings
from wan_train.training.experts.settings import TrainExpertSettings
from wan_train.training.old_settings import OldSettings
from wan_train.training.reporting.settings import HubSettings, LogSettings, PreviewSettings
from wan_train.training.saving.settings import SaveSettings

MIXED_PRECISIONS = ("no", "fp16", "bf16")
TIMESTEP_SAMPLINGS = ("uniform", "sigmoid", "shift", "sigma", "flux_shift", "logsnr", "qinglong_flux")
WEIGHTING_SCHEMES = ("none", "logit_normal", "mode", "cosmap", "sigma_sqrt")
LOSSES = ("mse", "huber")
SCHEDULES = (
    *("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"),
    *("cosine_with_min_lr", "warmup_stable_decay", "piecewise_constant", "adafactor", "rex"),
)


@dataclass(frozen=True)
class ConfigSettings:
    """Configuration file."""

    config_file: str | None = option(
        None,
        "TOML file of options by name; the command line takes precedence. Each run writes NAME.config.toml.",
        expands="wan_train.config_file:with_config_file",
    )


@dataclass(frozen=True)
class LoopSettings:
    """Training loop."""

    max_train_steps: int = option(1600, "Number of optimizer steps.", minimum=1)
    max_train_epochs: int | None = option(None, "Number of epochs; overrides --max_train_steps.", minimum=1)
    gradient_accumulation_steps: int = option(1, "Number of batches per optimizer step.", minimum=1)
    max_grad_norm: float = option(1.0, "Maximum gradient norm for clipping; 0 disables clipping.", minimum=0)
    skip_nonfinite: int = option(
        0, "Maximum number of steps to skip when the loss or gradient is NaN or Inf; 0 stops at the first.", minimum=0
    )
    ema_decay: float | None = option(
        None,
        "Decay of an exponential moving average (EMA) of the trained weights, saved as NAME-ema; default: no EMA.",
        minimum=0,
        maximum=1,
    )
    ema_cpu: bool = option(False, "Keep the EMA in CPU RAM.")
    mixed_precision: str | None = option(
        None, "Data type of the forward and backward pass; default: the launcher's, or no.", choices=MIXED_PRECISIONS
    )
    seed: int | None = option(
        None,
        "Random seed of noise, timesteps, data order and LoRA initialization; default: random, and logged.",
        minimum=0,
    )
    max_data_loader_n_workers: int = option(
        8, "Number of DataLoader worker processes; 0 loads in the main process.", minimum=0
    )
    persistent_data_loader_workers: bool = option(False, "Keep DataLoader workers alive between epochs.")

    def __post_init__(self) -> None:
        if self.ema_cpu and self.ema_decay is None:
            raise InputError("--ema_cpu requires --ema_decay")


@dataclass(frozen=True)
class ProcessSettings:
    """Distributed training."""

    ddp_timeout: float = option(
        240.0,
        "Timeout, in minutes, for waiting for other processes.",
        minimum=0.1,
    )
    ddp_gradient_as_bucket_view: bool = option(False, "Set gradient_as_bucket_view of DistributedDataParallel.")
    ddp_static_graph: bool = option(False, "Set static_graph of DistributedDataParallel.")


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer."""

    optimizer_type: str = option(
        "AdamW",
        "AdamW, AdamW8bit, AdamW8bitSR, PagedAdamW8bit, Lion, Lion8bit, Adafactor, Prodigy, CAME, AdamWScheduleFree, "
        "the name of any torch.optim class, or any package.Class.",
    )
    optimizer_args: tuple[str, ...] = option((), "Additional optimizer arguments, as key=value.", metavar="NAME=VALUE")
    learning_rate: float = option(2e-6, "Learning rate; 1 for Prodigy, which adapts it.", minimum=0)
    fused_backward_pass: bool = option(
        False,
        "Step each block's optimizer during the backward pass and free its gradients; clips gradients block-wise.",
    )
    optimizer_cpu_offload: bool = option(
        False, "Keep optimizer states in CPU RAM and copy them to the GPU for each parameter's step."
    )
    lr_scheduler: str = option("constant", "Learning rate schedule after warmup.", choices=SCHEDULES)
    lr_scheduler_type: str | None = option(
        None, "Class of torch.optim.lr_scheduler, or any package.Class, in place of --lr_scheduler."
    )
    lr_scheduler_args: tuple[str, ...] = option(
        (), "Additional arguments of the scheduler, as key=value.", metavar="NAME=VALUE"
    )
    lr_warmup_steps: str = option("0", "Warmup steps: a number, a ratio below 1, or a percentage such as 5%.")
    lr_decay_steps: str = option("0", "Decay steps of warmup_stable_decay: a number, a ratio below 1, or a percentage.")
    lr_scheduler_num_cycles: int = option(
        1, "Number of cycles, for cosine_with_restarts, cosine_with_min_lr and warmup_stable_decay.", minimum=1
    )
    lr_scheduler_power: float = option(1.0, "Power of the polynomial schedule.", minimum=0)
    lr_scheduler_timescale: int | None = option(
        None, "Timescale of inverse_sqrt, in steps; default: the warmup steps.", minimum=1
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        "Minimum learning rate as a ratio of the maximum, for cosine_with_min_lr, warmup_stable_decay "
        "(default: 0) and rex (default: 0.01).",
        minimum=0,
        maximum=1,
    )


@dataclass(frozen=True)
class TimestepSettings:
    """Timesteps."""

    timestep_sampling: str = option("uniform", "Distribution of training timesteps.", choices=TIMESTEP_SAMPLINGS)
    discrete_flow_shift: float = option(
        1.0, "Timestep shift towards noise, for shift and sigma.", flags=("--flow_shift",), minimum=1e-3, maximum=1e3
    )
    sigmoid_scale: float = option(
        1.0,
        "Scale of the sigmoid's input, for sigmoid, shift, flux_shift and qinglong_flux.",
        minimum=1e-3,
        maximum=1e3,
    )
    weighting_scheme: str = option(
        "none",
        "logit_normal and mode: timestep distribution for sigma; cosmap and sigma_sqrt: loss weighting.",
        choices=WEIGHTING_SCHEMES,
    )
    logit_mean: float = option(0.0, "Mean, for logsnr, qinglong_flux and logit_normal.", minimum=-100, maximum=100)
    logit_std: float = option(
        1.0, "Standard deviation, for logsnr, qinglong_flux and logit_normal.", minimum=1e-3, maximum=1e3
    )
    mode_scale: float = option(1.29, "Scale of the mode distribution.", minimum=-1, maximum=1.75)
    min_timestep: int = option(0, "Minimum training timestep, 0 to 1000.", minimum=0, maximum=1000)
    max_timestep: int = option(1000, "Maximum training timestep, 0 to 1000.", minimum=0, maximum=1000)
    preserve_distribution_shape: bool = option(
        False, "Truncate the distribution at --min_timestep and --max_timestep instead of rescaling it."
    )
    num_timestep_buckets: int | None = option(
        None,
        "Number of strata of the timestep distribution over which each epoch's samples are spread evenly.",
        minimum=1,
    )
    show_timesteps: str | None = option(
        None,
        "Show the timestep distribution in the console or as OUTPUT_DIR/timesteps.png, and exit.",
        choices=("image", "console"),
    )


@dataclass(frozen=True)
class LossSettings:
    """Loss."""

    loss_type: str = option("mse", "Loss function; huber is linear for large errors.", choices=LOSSES)
    huber_c: float = option(0.1, "Error at which huber becomes linear.", minimum=1e-6)


@dataclass(frozen=True)
class ImageSettings:
    """Image and control conditions."""

    image_dropout_rate: float = option(
        0.0,
        "Probability of dropping a sample's images.",
        minimum=0,
        maximum=1,
    )
    control_dropout_rate: float = option(
        0.0,
        "Probability of dropping a sample's control video, or VACE video.",
        minimum=0,
        maximum=1,
    )
    reference_dropout_rate: float = option(
        0.0,
        "Probability of dropping a sample's reference images.",
        minimum=0,
        maximum=1,
    )
    one_frame: bool = option(False, "Train on caches that were made with --one_frame.")
    i2v_ratio: float | None = option(
        None,
        "With ti2v-5B, ratio of samples trained as image-to-video, with the first frame given; default: 0.5.",
        minimum=0,
        maximum=1,
    )


@dataclass(frozen=True)
class PriorSettings:
    """Prior preservation."""

    prior_loss_weight: float = option(0.0, "Weight of the prior preservation loss on --prior_captions.", minimum=0)
    prior_captions: str | None = option(None, "Text file of captions for prior preservation, one per line; needs --t5.")

    def __post_init__(self) -> None:
        if (self.prior_loss_weight > 0) != (self.prior_captions is not None):
            raise InputError("--prior_loss_weight and --prior_captions go together: give both or neither")


@dataclass(frozen=True)
class ValidationSettings:
    """Validation."""

    validation_config: str | None = option(
        None,
        "Dataset file, like --dataset_config, of cached clips for validation that are never trained on.",
        metavar="TOML",
    )
    validation_split: float | None = option(
        None,
        "Ratio of the training files to hold out for validation, chosen by file name.",
        minimum=0.001,
        maximum=0.5,
    )
    validate_every_n_steps: int | None = option(
        None, "Evaluate every N optimizer steps, and before the first and after the last step.", minimum=1
    )
    validate_every_n_epochs: int | None = option(None, "Evaluate every N epochs.", minimum=1)
    validation_timesteps: int = option(
        8, "Number of timesteps at which each validation clip is evaluated, stratified.", minimum=1
    )
    validation_seed: int = option(
        0,
        "Random seed of the validation noise and of --validation_split; runs with the same seed are comparable.",
        minimum=0,
    )
    early_stop: int | None = option(
        None, "Stop after N evaluations in a row without an improvement beyond the 95% confidence interval.", minimum=1
    )


@dataclass(frozen=True)
class TrainSettings:
    """All settings of the trainer."""

    config: ConfigSettings
    dit: DitSettings
    init: InitSettings
    experts: TrainExpertSettings
    weights: WeightSettings
    stream: StreamSettings
    activations: RecomputeSettings
    compile: CompileSettings
    vae: VaeSettings
    text: TextEncoderSettings
    image: ImageEncoderSettings
    data: DatasetSettings
    caches: CacheReadSettings
    network: NetworkSettings
    loop: LoopSettings
    processes: ProcessSettings
    optimizer: OptimizerSettings
    timesteps: TimestepSettings
    loss: LossSettings
    images: ImageSettings
    prior: PriorSettings
    save: SaveSettings
    preview: PreviewSettings
    validation: ValidationSettings
    logs: LogSettings
    profile: ProfileSettings
    hub: HubSettings
    old: OldSettings


TOOL = Tool(
    "wan_train_network.py",
    "Train a LoRA on a Wan model, or its own weights; start it with accelerate launch.",
    TrainSettings,
    "wan_train.training.main:main",
)
