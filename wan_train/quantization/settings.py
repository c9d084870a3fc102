"""Settings of how the weights of the blocks are stored. Nothing here imports torch."""

from dataclasses import dataclass

from wan_train.cli import option
from wan_train.errors import InputError


@dataclass(frozen=True)
class WeightSettings:
    """Precision of the frozen weights."""

    fp8_base: bool = option(False, "Keep the matrices of the blocks in fp8 (e4m3): half of bf16.", flags=("--fp8",))
    fp8_scaled: bool = option(False, "Scale every 64 inputs of those matrices apart: much closer; needs --fp8_base.")
    int8_base: bool = option(
        False, "Keep the matrices of the blocks in int8 and multiply in int8, inputs rounded too.", flags=("--int8",)
    )
    int8_ffn2: bool = option(False, "With --int8_base, the second matrix of the feed-forward as well: it errs most.")

    def __post_init__(self) -> None:
        if self.fp8_scaled and not self.fp8_base:
            raise InputError("--fp8_scaled scales what --fp8_base (or --fp8) stores: give that too")
        if self.int8_base and self.fp8_base:
            raise InputError("--int8_base and --fp8_base both say how weights are stored: give one of them")
        if self.int8_ffn2 and not self.int8_base:
            raise InputError("--int8_ffn2 widens what --int8_base covers: give that too")


@dataclass(frozen=True)
class FastWeightSettings(WeightSettings):
    """Precision of the weights."""

    fp8_fast: bool = option(False, "Multiply in fp8 where the device can, inputs rounded too; needs --fp8_scaled.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fp8_fast and not self.fp8_scaled:
            raise InputError("--fp8_fast multiplies what --fp8_scaled stores: give --fp8 --fp8_scaled too")
