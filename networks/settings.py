"""Options of the trained network and of the scripts for LoRA files."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from itertools import zip_longest

from wan_train.cli import Tool, nearest, option, positional
from wan_train.errors import InputError

DEFAULT_DIM = 4


@dataclass(frozen=True)
class NetworkSettings:
    """Network."""

    network_module: str = option(
        "networks.lora_wan",
        "Python module of the network to train: networks.lora_wan for LoRA, networks.full for full fine-tuning.",
    )
    network_dim: int | None = option(None, "LoRA rank; default: 4.", minimum=1)
    network_alpha: float = option(
        1.0, "LoRA alpha; the effective scale is alpha/dim. Greater than 0, often equal to --network_dim."
    )
    network_dropout: float | None = option(
        None, "Dropout probability of the LoRA's rank activations during training, 0 to below 1."
    )
    network_args: tuple[str, ...] = option(
        (),
        "Additional arguments of the network module, as key=value. For LoRA: exclude_patterns, "
        "include_patterns, conv_dim, conv_alpha, rank_dropout, module_dropout, loraplus_lr_ratio and verbose.",
        metavar="KEY=VALUE",
    )
    network_weights: str | None = option(None, "LoRA file to initialize the network from; all keys must match.")
    dim_from_weights: bool = option(False, "Take modules, ranks and alphas from the file given as --network_weights.")
    scale_weight_norms: float | None = option(
        None, "Maximum norm of each module's weight change, applied after each step; greater than 0, often 1."
    )
    trainable: tuple[str, ...] = option(
        (),
        "With networks.full, patterns of the parameter names to train, such as blocks.*.self_attn.*; default:"
        " all parameters.",
        metavar="PATTERN",
    )
    train_also: str | None = option(
        None, "With --trainable, also train a LoRA on the remaining Linear layers: networks.lora_wan."
    )
    full_bf16: bool = option(
        False,
        "With networks.full, keep the matrices in bfloat16 and update them with stochastic rounding.",
    )
    base_weights: tuple[str, ...] = option((), "LoRA files to merge into the model before training.")
    base_weights_multiplier: tuple[float, ...] = option(
        (), "Multiplier of each --base_weights file, in order; default: 1.0."
    )

    def __post_init__(self) -> None:
        self._check_weights()
        if not (self.network_alpha > 0 and math.isfinite(self.network_alpha)):
            raise InputError(f"--network_alpha {self.network_alpha:g} is out of range: must be above 0")
        if self.network_dropout is not None and not 0 <= self.network_dropout < 1:
            raise InputError(
                f"--network_dropout {self.network_dropout:g} is out of range: must be at least 0 and below 1"
            )

    def _check_weights(self) -> None:
        limit = self.scale_weight_norms
        if limit is not None and not (limit > 0 and math.isfinite(limit)):
            raise InputError(f"--scale_weight_norms {limit:g} is out of range: must be above 0")
        if self.dim_from_weights and self.network_weights is None:
            raise InputError("--dim_from_weights needs --network_weights: give the file, or remove the option")
        if self.dim_from_weights and self.network_dim is not None:
            raise InputError(
                "--dim_from_weights uses the ranks of the file and cannot be combined with --network_dim"
                f" {self.network_dim}: "
                "remove one of them"
            )
        given, files = len(self.base_weights_multiplier), len(self.base_weights)
        if given > files:
            raise InputError(f"{given} --base_weights_multiplier for {files} --base_weights: give at most one per file")
        if not all(map(math.isfinite, self.base_weights_multiplier)):
            raise InputError("--base_weights_multiplier must be finite numbers")

    @property
    def dim(self) -> int:
        """The rank; default: `DEFAULT_DIM`."""
        return DEFAULT_DIM if self.network_dim is None else self.network_dim

    @property
    def base_loras(self) -> tuple[tuple[str, float], ...]:
        """The LoRA files to merge into the model, each with its multiplier."""
        return tuple(zip_longest(self.base_weights, self.base_weights_multiplier, fillvalue=1.0))  # type: ignore[arg-type]


def read_arguments(settings: NetworkSettings, known: Collection[str] | None = None) -> dict[str, str]:
    """Return `--network_args` as a dict, split at the first "=". Raises InputError for a key that is not in `known`."""
    arguments: dict[str, str] = {}
    for text in settings.network_args:
        key, separator, value = text.partition("=")
        if not separator:
            raise InputError(f"--network_args {text!r} has no '=': use key=value")
        if known is not None and key not in known:
            listed = f"accepts {', '.join(known)}" if known else "accepts none"
            module = settings.network_module
            raise InputError(f"unknown key {key!r} in --network_args: {module} {listed}{nearest(key, known)}")
        if key in arguments:
            raise InputError(f"--network_args sets {key} twice: set it once")
        arguments[key] = value
    return arguments


@dataclass(frozen=True)
class ConvertSettings:
    """Conversion."""

    input: str = option("", "LoRA file to convert, with any supported key naming.", required=True)
    output: str = option("", "Output .safetensors file.", required=True)
    target: str = option(
        "",
        "Key format to write: other is lora_A/lora_B with alpha folded in, default is kohya's lora_unet_ with"
        " alpha, diffusers is other with diffusers' module names, which it needs for VACE.",
        choices=("other", "default", "diffusers"),
        required=True,
    )
    diffusers_prefix: str = option("diffusion_model", "Prefix of the keys with --target other.", metavar="PREFIX")


@dataclass(frozen=True)
class ConvertLoraSettings:
    """All options of the converter."""

    convert: ConvertSettings


TOOL = Tool(
    "convert_lora.py",
    "Convert a LoRA between the key namings of this project, kohya, ComfyUI and diffusers, without changing its"
    " effect.",
    ConvertLoraSettings,
    "networks.tools.convert:main",
)


@dataclass(frozen=True)
class ExtractSettings:
    """Extraction."""

    base: str = option("", "Checkpoint before fine-tuning.", flags=("--model_org",), required=True)
    tuned: str = option("", "Checkpoint after fine-tuning.", flags=("--model_tuned",), required=True)
    output: str = option("", "Safetensors file to write.", flags=("--save_to",), required=True)
    rank: int = option(64, "Maximum rank of each LoRA pair.", flags=("--dim",), minimum=1)
    save_precision: str = option("float", "Data type of the saved LoRA.", choices=("float", "fp32", "bf16", "fp16"))
    device: str = option(
        "", "Device for the decomposition, such as cuda or cpu; default: the first accelerator, else the CPU."
    )


@dataclass(frozen=True)
class ExtractLoraSettings:
    """All options of the extractor."""

    extract: ExtractSettings


EXTRACT = Tool(
    "extract_lora.py",
    "Extract a LoRA from the difference of two checkpoints by SVD, and print the share of the change kept per block.",
    ExtractLoraSettings,
    "networks.tools.extract:main",
)


@dataclass(frozen=True)
class AverageSettings:
    """Averaging."""

    path: tuple[str, ...] = positional("Two or more LoRA files of one training run.")
    output_file: str = option("", "Safetensors file to write.", required=True)
    beta: float = option(
        0.95, "EMA decay: weight of the running average when the next file is added.", minimum=0, maximum=1
    )
    beta2: float | None = option(
        None,
        "EMA decay at the last file; the decay is interpolated linearly from --beta.",
        minimum=0,
        maximum=1,
    )
    sigma_rel: float | None = option(
        None,
        "Width of the EMA relative to the length of the run (Karras et al. 2024), in place of --beta.",
        minimum=0.01,
        maximum=0.28,
    )
    no_sort: bool = option(False, "Average the files in the order given; default: by their training step.")


@dataclass(frozen=True)
class AverageLoraSettings:
    """All options of the averager."""

    average: AverageSettings


AVERAGE = Tool(
    "lora_post_hoc_ema.py",
    "Post-hoc EMA: average the LoRA files saved by one run, with most weight on the later ones.",
    AverageLoraSettings,
    "networks.tools.average:main",
)
