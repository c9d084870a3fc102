"""Settings of the trained network and of the tools for LoRA files."""

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

    network_module: str = option("networks.lora_wan", "Python module of what is trained.")
    network_dim: int | None = option(None, f"Rank of each LoRA pair; {DEFAULT_DIM} when not given.", minimum=1)
    network_alpha: float = option(1.0, "The learnt change is scaled by alpha/dim; above 0, often the dim itself.")
    network_dropout: float | None = option(
        None, "Probability of dropping a rank's activation in training; from 0 to below 1."
    )
    network_args: tuple[str, ...] = option(
        (),
        "Further arguments of the network module; of a LoRA exclude_patterns, include_patterns, conv_dim, "
        "conv_alpha, rank_dropout, module_dropout, loraplus_lr_ratio and verbose.",
        metavar="KEY=VALUE",
    )
    network_weights: str | None = option(None, "LoRA file to start from; it must fit the network in every part.")
    dim_from_weights: bool = option(
        False, "Train the modules of the file given as --network_weights, with its dims and alphas."
    )
    scale_weight_norms: float | None = option(
        None, "After each step shrink each module's learnt change to this norm at most; above 0, often 1."
    )
    trainable: tuple[str, ...] = option(
        (),
        "With networks.full, patterns of the names of the weights that are trained, such as blocks.*.self_attn.*;"
        " without it all are.",
        metavar="PATTERN",
    )
    train_also: str | None = option(
        None, "With --trainable, train a LoRA as well, on the Linears that are left: networks.lora_wan."
    )
    full_bf16: bool = option(
        False,
        "With networks.full, keep matrices in bfloat16, rounded at random after each step so that small ones count.",
    )
    base_weights: tuple[str, ...] = option(
        (), "LoRA files to merge into the model before the network is trained on it."
    )
    base_weights_multiplier: tuple[float, ...] = option(
        (), "Strength of each of the --base_weights, in their order; 1.0 where none is given."
    )

    def __post_init__(self) -> None:
        self._check_weights()
        if not (self.network_alpha > 0 and math.isfinite(self.network_alpha)):
            raise InputError(f"--network_alpha {self.network_alpha:g} is out of range: give a number above 0")
        if self.network_dropout is not None and not 0 <= self.network_dropout < 1:
            raise InputError(f"--network_dropout {self.network_dropout:g} is out of range: give 0 or more, below 1")

    def _check_weights(self) -> None:
        limit = self.scale_weight_norms
        if limit is not None and not (limit > 0 and math.isfinite(limit)):
            raise InputError(f"--scale_weight_norms {limit:g} is out of range: give a number above 0")
        if self.dim_from_weights and self.network_weights is None:
            raise InputError("--dim_from_weights needs --network_weights: give the file, or leave it out")
        if self.dim_from_weights and self.network_dim is not None:
            raise InputError(
                f"--dim_from_weights takes the dims of the file, --network_dim {self.network_dim} says another: "
                "leave out one of them"
            )
        given, files = len(self.base_weights_multiplier), len(self.base_weights)
        if given > files:
            raise InputError(f"{given} --base_weights_multiplier for {files} --base_weights: give one to each at most")
        if not all(map(math.isfinite, self.base_weights_multiplier)):
            raise InputError("--base_weights_multiplier must be finite numbers")

    @property
    def dim(self) -> int:
        """The rank, given or not."""
        return DEFAULT_DIM if self.network_dim is None else self.network_dim

    @property
    def base_loras(self) -> tuple[tuple[str, float], ...]:
        """The LoRA files to merge into the model, each with its multiplier."""
        return tuple(zip_longest(self.base_weights, self.base_weights_multiplier, fillvalue=1.0))  # type: ignore[arg-type]


def read_arguments(settings: NetworkSettings, known: Collection[str] | None = None) -> dict[str, str]:
    """`--network_args` as a dictionary, split at the first "=". InputError for a key that is not among the `known`."""
    arguments: dict[str, str] = {}
    for text in settings.network_args:
        key, separator, value = text.partition("=")
        if not separator:
            raise InputError(f"--network_args {text!r} has no '=': write key=value")
        if known is not None and key not in known:
            listed = f"takes {', '.join(known)}" if known else "takes none"
            module = settings.network_module
            raise InputError(f"unknown key {key!r} in --network_args: {module} {listed}{nearest(key, known)}")
        if key in arguments:
            raise InputError(f"--network_args has {key} twice: give it once")
        arguments[key] = value
    return arguments


@dataclass(frozen=True)
class ConvertSettings:
    """Conversion."""

    input: str = option("", "LoRA file to read, of any known naming.", required=True)
    output: str = option("", "Safetensors file to write.", required=True)
    target: str = option(
        "",
        "Naming to write: other is lora_A/lora_B with alpha folded in, default is lora_unet_ with alpha, "
        "diffusers is other with its own names of modules, which it needs for VACE.",
        choices=("other", "default", "diffusers"),
        required=True,
    )
    diffusers_prefix: str = option("diffusion_model", "First part of the names under --target other.", metavar="PREFIX")


@dataclass(frozen=True)
class ConvertLoraSettings:
    """All settings of the converter."""

    convert: ConvertSettings


TOOL = Tool(
    "convert_lora.py",
    "Rename a LoRA for other tools, or their LoRA for this one, without changing what it does.",
    ConvertLoraSettings,
    "networks.tools.convert:main",
)


@dataclass(frozen=True)
class ExtractSettings:
    """Extraction."""

    base: str = option("", "Checkpoint that the tuning began with.", flags=("--model_org",), required=True)
    tuned: str = option("", "Checkpoint after it.", flags=("--model_tuned",), required=True)
    output: str = option("", "Safetensors file to write.", flags=("--save_to",), required=True)
    rank: int = option(64, "Rank of each pair, at most.", flags=("--dim",), minimum=1)
    save_precision: str = option("float", "Precision of the LoRA.", choices=("float", "fp32", "bf16", "fp16"))
    device: str = option("", "Where to decompose, as cuda or cpu; without it an accelerator where there is one.")


@dataclass(frozen=True)
class ExtractLoraSettings:
    """All settings of the extractor."""

    extract: ExtractSettings


EXTRACT = Tool(
    "extract_lora.py",
    "Write as a LoRA what full fine-tuning changed, as well as a rank allows; the kept share of each block is printed.",
    ExtractLoraSettings,
    "networks.tools.extract:main",
)


@dataclass(frozen=True)
class AverageSettings:
    """Averaging."""

    path: tuple[str, ...] = positional("Two or more LoRA files of one run.")
    output_file: str = option("", "Safetensors file to write.", required=True)
    beta: float = option(0.95, "Share of the average that each further file leaves.", minimum=0, maximum=1)
    beta2: float | None = option(
        None,
        "Share at the last file; between the second and it the share changes in equal steps.",
        minimum=0,
        maximum=1,
    )
    sigma_rel: float | None = option(
        None,
        "Instead of beta: width of the average relative to the length of the run (Karras et al. 2024).",
        minimum=0.01,
        maximum=0.28,
    )
    no_sort: bool = option(
        False, "Take the files in the order given; default: in the order of the steps that they say."
    )


@dataclass(frozen=True)
class AverageLoraSettings:
    """All settings of the averager."""

    average: AverageSettings


AVERAGE = Tool(
    "lora_post_hoc_ema.py",
    "Average LoRA files that one run saved, the later ones counting most.",
    AverageLoraSettings,
    "networks.tools.average:main",
)
