"""The two experts of Wan2.2 A14B: one model for the noisier part of the path, another for the rest."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from wan_train.errors import InputError
from wan_train.flow.timesteps import NUM_TIMESTEPS
from wan_train.models.variants import Variant

HIGH, LOW = "high_noise", "low_noise"
ORDER = (HIGH, LOW)  # in which a run from noise to data meets them
FLAGS: dict[str | None, str] = {None: "--dit", LOW: "--dit", HIGH: "--dit_high_noise"}  # the option of each one's file

T = TypeVar("T")


def experts_of(variant: Variant) -> tuple[str | None, ...]:
    """The models of a task: its experts in the order of a run, or None for the only one."""
    return (None,) if variant.experts is None else ORDER


def expert_at(timestep: float, boundary: float) -> str:
    """The expert for a timestep in 0..1000; at the boundary, a t in [0, 1], it is the one for high noise (official)."""
    return HIGH if timestep >= boundary * NUM_TIMESTEPS else LOW


def span_of(expert: str, boundary: float) -> tuple[float, float]:
    """The range of t, in [0, 1], that an expert is for."""
    return {HIGH: (boundary, 1.0), LOW: (0.0, boundary)}[expert]


def read_boundary(given: float | None, variant: Variant, flag: str = "--timestep_boundary") -> float:
    """The boundary as t in [0, 1]: as users give it, 0..1 or 0..1000, or the task's. InputError for another number, and
    for a task of one model, naming the option that asks for it."""
    if variant.experts is None:
        raise InputError(f"{flag}: --task {variant.name} has one model and therefore no boundary: use an A14B task")
    if given is None:
        return variant.experts.boundary
    t = given / NUM_TIMESTEPS if given > 1 else given
    if not 0 < t < 1:
        raise InputError(f"--timestep_boundary {given:g}: it lies between 0 and 1, or as a timestep between 1 and 1000")
    return t


@dataclass(frozen=True)
class Pair(Generic[T]):
    """Something of each expert."""

    high_noise: T
    low_noise: T

    def of(self, expert: str) -> T:
        """What is this expert's."""
        return {HIGH: self.high_noise, LOW: self.low_noise}[expert]

    def items(self) -> Iterator[tuple[str, T]]:
        """Each expert with what is its, in the order of a run."""
        yield from ((expert, self.of(expert)) for expert in ORDER)


def pair_of(values: Mapping[str, T]) -> Pair[T]:
    """A pair of values by expert."""
    return Pair(values[HIGH], values[LOW])
