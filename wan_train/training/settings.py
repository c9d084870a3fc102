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
        "TOML file with options by name; those on the command line win. Each run leaves NAME.config.toml.",
        expands="wan_train.config_file:with_config_file",
    )


@dataclass(frozen=True)
class LoopSettings:
    """Training loop."""

    max_train_steps: int = option(1600, "Optimizer steps to take.", minimum=1)
    max_train_epochs: int | None = option(None, "Epochs to train; overrides --max_train_steps.", minimum=1)
    gradient_accumulation_steps: int = option(1, "Batches per optimizer step.", minimum=1)
    max_grad_norm: float = option(1.0, "Clip the gradient to this norm; 0 does not clip.", minimum=0)
    skip_nonfinite: int = option(
        0, "Leave out at most so many steps whose loss or gradient is not a number, instead of stopping.", minimum=0
    )
    ema_decay: float | None = option(
        None,
        "Keep an average of what is trained, with this decay, and save it beside, as NAME-ema.",
        minimum=0,
        maximum=1,
    )
    ema_cpu: bool = option(False, "Keep that average in main memory.")
    mixed_precision: str | None = option(
        None, "Precision that the model computes in; default: the launcher's, or no.", choices=MIXED_PRECISIONS
    )
    seed: int | None = option(
        None, "Seed of noise, timesteps, order and LoRA; without it one is drawn and printed.", minimum=0
    )
    max_data_loader_n_workers: int = option(8, "Processes that read batches; 0 reads in the trainer.", minimum=0)
    persistent_data_loader_workers: bool = option(False, "Keep the readers between epochs.")

    def __post_init__(self) -> None:
        if self.ema_cpu and self.ema_decay is None:
            raise InputError("--ema_cpu says where the average of --ema_decay is kept: give that too")


@dataclass(frozen=True)
class ProcessSettings:
    """Several processes."""

    ddp_timeout: float = option(
        240.0,
        "Minutes that a process waits for the others, such as for their previews or a file, before the run ends.",
        minimum=0.1,
    )
    ddp_gradient_as_bucket_view: bool = option(False, "Let gradients share memory with what is exchanged.")
    ddp_static_graph: bool = option(False, "Promise that each step takes the same path through the model.")


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer."""

    optimizer_type: str = option(
        "AdamW",
        "AdamW, AdamW8bit, AdamW8bitSR, PagedAdamW8bit, Lion, Lion8bit, Adafactor, Prodigy, CAME, AdamWScheduleFree, "
        "the name of any torch.optim class, or any package.Class.",
    )
    optimizer_args: tuple[str, ...] = option((), "Further arguments of the optimizer.", metavar="NAME=VALUE")
    learning_rate: float = option(2e-6, "Learning rate; Prodigy finds its own and takes 1 here.", minimum=0)
    fused_backward_pass: bool = option(
        False,
        "Step each block as soon as the backward pass has its gradients, and give them up; clips block by block.",
    )
    optimizer_cpu_offload: bool = option(
        False, "Keep the optimizer's states in main memory; each weight's come to the device for its step."
    )
    lr_scheduler: str = option("constant", "How the learning rate goes after the warm-up.", choices=SCHEDULES)
    lr_scheduler_type: str | None = option(
        None, "A schedule of torch.optim.lr_scheduler, or any package.Class, in place of --lr_scheduler."
    )
    lr_scheduler_args: tuple[str, ...] = option((), "Further arguments of the schedule.", metavar="NAME=VALUE")
    lr_warmup_steps: str = option("0", "Steps of linear warm-up: a number, a share below 1, or a percentage like 5%.")
    lr_decay_steps: str = option(
        "0", "Steps of the final decay, for warmup_stable_decay: a number, a share below 1, or a percentage."
    )
    lr_scheduler_num_cycles: int = option(
        1, "Cycles, for cosine_with_restarts, cosine_with_min_lr and warmup_stable_decay.", minimum=1
    )
    lr_scheduler_power: float = option(1.0, "Power of the decay, for polynomial.", minimum=0)
    lr_scheduler_timescale: int | None = option(
        None, "Steps that the decay is measured in, for inverse_sqrt; without it those of the warm-up.", minimum=1
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        "Lowest learning rate as a part of the highest: for cosine_with_min_lr, for warmup_stable_decay (without it 0) "
        "and for rex (without it 0.01).",
        minimum=0,
        maximum=1,
    )


@dataclass(frozen=True)
class TimestepSettings:
    """Noise levels."""

    timestep_sampling: str = option("uniform", "How noise levels are drawn.", choices=TIMESTEP_SAMPLINGS)
    discrete_flow_shift: float = option(
        1.0, "Shift towards noise, for shift and sigma.", flags=("--flow_shift",), minimum=1e-3, maximum=1e3
    )
    sigmoid_scale: float = option(
        1.0, "Width of the distribution, for sigmoid, shift, flux_shift and qinglong_flux.", minimum=1e-3, maximum=1e3
    )
    weighting_scheme: str = option(
        "none",
        "logit_normal and mode: how sigma draws noise levels; cosmap and sigma_sqrt: how much the loss of each counts.",
        choices=WEIGHTING_SCHEMES,
    )
    logit_mean: float = option(
        0.0, "Mean, for logsnr, qinglong_flux and logit_normal; above 0 is less noise.", minimum=-100, maximum=100
    )
    logit_std: float = option(1.0, "Deviation, for logsnr, qinglong_flux and logit_normal.", minimum=1e-3, maximum=1e3)
    mode_scale: float = option(1.29, "How far mode draws towards the middle.", minimum=-1, maximum=1.75)
    min_timestep: int = option(0, "Least noise level to train, of 1000.", minimum=0, maximum=1000)
    max_timestep: int = option(1000, "Greatest noise level to train, of 1000.", minimum=0, maximum=1000)
    preserve_distribution_shape: bool = option(
        False, "Draw from what the distribution has between those two, instead of squeezing all of it in between."
    )
    num_timestep_buckets: int | None = option(
        None, "Spread each epoch's samples evenly over N strata of the noise levels.", minimum=1
    )
    show_timesteps: str | None = option(
        None,
        "Show how noise levels will be drawn, here or in OUTPUT_DIR/timesteps.png, and stop.",
        choices=("image", "console"),
    )


@dataclass(frozen=True)
class LossSettings:
    """Loss."""

    loss_type: str = option("mse", "How an error counts: squared, or with huber linearly once large.", choices=LOSSES)
    huber_c: float = option(0.1, "From which error on huber is linear.", minimum=1e-6)


@dataclass(frozen=True)
class ImageSettings:
    """Tasks with images."""

    image_dropout_rate: float = option(
        0.0,
        "Share of the samples that are trained on without their images, drawn anew each time.",
        minimum=0,
        maximum=1,
    )
    control_dropout_rate: float = option(
        0.0,
        "Share of the samples that are trained on without their control video, or VACE video, drawn anew each time.",
        minimum=0,
        maximum=1,
    )
    reference_dropout_rate: float = option(
        0.0,
        "Share of the samples that are trained on without their reference images, drawn anew each time.",
        minimum=0,
        maximum=1,
    )
    one_frame: bool = option(False, "Train on caches that were made with --one_frame.")
    i2v_ratio: float | None = option(
        None,
        "With ti2v-5B, the share of samples whose first frame is given; the others are text to video; 0.5 without it.",
        minimum=0,
        maximum=1,
    )


@dataclass(frozen=True)
class PriorSettings:
    """Keeping what the model knows."""

    prior_loss_weight: float = option(
        0.0, "How much it counts that captions of --prior_captions look as they did without the adapter.", minimum=0
    )
    prior_captions: str | None = option(None, "Text file of such captions, one to a line; needs --t5.")

    def __post_init__(self) -> None:
        if (self.prior_loss_weight > 0) != (self.prior_captions is not None):
            raise InputError("--prior_loss_weight and --prior_captions go together: give both or neither")


@dataclass(frozen=True)
class ValidationSettings:
    """Held-out loss."""

    validation_config: str | None = option(
        None,
        "TOML or JSON file, like --dataset_config, of cached clips that are never trained on, to measure the loss on.",
        metavar="TOML",
    )
    validation_split: float | None = option(
        None,
        "Hold out this share of the training files, chosen by their names, to measure the loss on.",
        minimum=0.001,
        maximum=0.5,
    )
    validate_every_n_steps: int | None = option(
        None, "Measure after every N optimizer steps, beside before the first and after the last.", minimum=1
    )
    validate_every_n_epochs: int | None = option(None, "Measure after every N epochs.", minimum=1)
    validation_timesteps: int = option(
        8, "Noise levels that each held-out clip is measured at, one from each of as many equal shares.", minimum=1
    )
    validation_seed: int = option(
        0, "Key of the held-out noise and of --validation_split; runs with the same one can be compared.", minimum=0
    )
    early_stop: int | None = option(
        None, "Stop after N measurements in a row without an improvement beyond its 95% interval.", minimum=1
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
