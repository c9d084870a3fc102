"""Options for the storage of the blocks' weights. Nothing here imports torch."""

from dataclasses import dataclass

from wan_train.cli import option
from wan_train.errors import InputError


@dataclass(frozen=True)
class WeightSettings:
    """Precision of the frozen weights."""

    fp8_base: bool = option(
        False, "Store the blocks' matrices in fp8 (e4m3): half the memory of bf16.", flags=("--fp8",)
    )
    fp8_scaled: bool = option(
        False, "Scale fp8 weights block-wise, every 64 inputs: much more accurate; needs --fp8_base."
    )
    int8_base: bool = option(
        False,
        "Store the blocks' matrices in int8 and multiply in int8, with activations quantized per token.",
        flags=("--int8",),
    )
    int8_ffn2: bool = option(
        False, "With --int8_base, also quantize the second feed-forward matrix, which loses the most accuracy."
    )

    def __post_init__(self) -> None:
        if self.fp8_scaled and not self.fp8_base:
            raise InputError("--fp8_scaled requires --fp8_base (--fp8 in the generator)")
        if self.int8_base and self.fp8_base:
            raise InputError("--int8_base and --fp8_base are mutually exclusive: give one of them")
        if self.int8_ffn2 and not self.int8_base:
            raise InputError("--int8_ffn2 requires --int8_base")


@dataclass(frozen=True)
class FastWeightSettings(WeightSettings):
    """Precision of the weights."""

    fp8_fast: bool = option(
        False, "Multiply in fp8 where the device supports it, with activations quantized too; needs --fp8_scaled."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fp8_fast and not self.fp8_scaled:
            raise InputError("--fp8_fast requires --fp8 and --fp8_scaled")
