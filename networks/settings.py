"""Settings of the trained network and of `convert_lora.py`."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from wan_train.cli import InputError, Tool, nearest, option

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
    network_args: tuple[str, ...] = option((), "Further arguments of the network module.", metavar="KEY=VALUE")

    def __post_init__(self) -> None:
        if not (self.network_alpha > 0 and math.isfinite(self.network_alpha)):
            raise InputError(f"--network_alpha {self.network_alpha:g} is out of range: give a number above 0")
        if self.network_dropout is not None and not 0 <= self.network_dropout < 1:
            raise InputError(f"--network_dropout {self.network_dropout:g} is out of range: give 0 or more, below 1")

    @property
    def dim(self) -> int:
        """The rank, given or not."""
        return DEFAULT_DIM if self.network_dim is None else self.network_dim


def read_arguments(settings: NetworkSettings, known: Collection[str]) -> dict[str, str]:
    """`--network_args` as a dictionary, split at the first "=". InputError for a key that is not `known`."""
    arguments: dict[str, str] = {}
    for text in settings.network_args:
        key, separator, value = text.partition("=")
        if not separator:
            raise InputError(f"--network_args {text!r} has no '=': write key=value")
        if key not in known:
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
        "Naming to write: other is lora_A/lora_B with alpha folded in, default is lora_unet_ with alpha.",
        choices=("other", "default"),
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
    "networks.convert:main",
)
