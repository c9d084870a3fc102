"""The two experts of Wan2.2 A14B: one model for high noise levels, another for low ones."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from wan_train.errors import InputError
from wan_train.flow.timesteps import NUM_TIMESTEPS
from wan_train.models.variants import Variant

HIGH, LOW = "high_noise", "low_noise"
ORDER = (HIGH, LOW)  # from noise to data
FLAGS: dict[str | None, str] = {
    None: "--dit",
    LOW: "--dit",
    HIGH: "--dit_high_noise",
}  # the option of each expert's checkpoint

T = TypeVar("T")


def experts_of(variant: Variant) -> tuple[str | None, ...]:
    """Return the models of a task: its experts in sampling order, or (None,) for a single model."""
    return (None,) if variant.experts is None else ORDER


def expert_at(timestep: float, boundary: float) -> str:
    """Return the expert for a timestep in 0..1000: the high-noise one from `boundary`, a t in [0, 1], on (official)."""
    return HIGH if timestep >= boundary * NUM_TIMESTEPS else LOW


def span_of(expert: str, boundary: float) -> tuple[float, float]:
    """Return the range of t, in [0, 1], of an expert."""
    return {HIGH: (boundary, 1.0), LOW: (0.0, boundary)}[expert]


def read_boundary(given: float | None, variant: Variant, flag: str = "--timestep_boundary") -> float:
    """Return the boundary as t in [0, 1] from user input (0..1, or 0..1000), or the task's default.

    Raises InputError for a value out of range, and for a task with a single model, naming the option `flag`.
    """
    if variant.experts is None:
        raise InputError(f"{flag}: --task {variant.name} has a single model and no boundary: use an A14B task")
    if given is None:
        return variant.experts.boundary
    t = given / NUM_TIMESTEPS if given > 1 else given
    if not 0 < t < 1:
        raise InputError(
            f"--timestep_boundary {given:g} is out of range: give a t between 0 and 1, or a timestep between 1 and 1000"
        )
    return t


@dataclass(frozen=True)
class Pair(Generic[T]):
    """A value for each expert."""

    high_noise: T
    low_noise: T

    def of(self, expert: str) -> T:
        """Return the value of an expert."""
        return {HIGH: self.high_noise, LOW: self.low_noise}[expert]

    def items(self) -> Iterator[tuple[str, T]]:
        """Yield (expert, value) in sampling order."""
        yield from ((expert, self.of(expert)) for expert in ORDER)


def pair_of(values: Mapping[str, T]) -> Pair[T]:
    """Make a pair from values by expert."""
    return Pair(values[HIGH], values[LOW])
