"""Compare validation losses: paired differences, their confidence intervals, and the best evaluation so far."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wan_train.log import get_logger

log = get_logger(__name__)

NUM_DRAWS = 2000
TAILS = (0.025, 0.975)  # a 95% interval
_NORMAL = 1.959964  # 97.5% quantile of the normal distribution, and below of Student's t by degrees of freedom from 1
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

Losses = NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """Difference of the mean loss to that at `step`, and its 95% interval, which is infinite for a single file."""

    step: int
    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """improved or worse if the whole interval is on one side of 0, otherwise unclear."""
        return "improved" if self.high < 0 else "worse" if self.low > 0 else "unclear"

    def row(self) -> dict[str, float | int | None]:
        """Return the difference for JSON, with null for infinity."""
        numbers = {"mean": self.mean, "low": self.low, "high": self.high}
        return {"step": self.step} | {name: _finite(value) for name, value in numbers.items()}


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the validation clips: the mean loss, the loss of each stratum of t, and comparisons.

    `to_first` and `to_best` compare with the first evaluation and with the best before this one; both are None for the
    first. `is_best` means the lowest mean so far. If two `experts` are trained, the strata of the first are followed by
    those of the second.
    """

    step: int
    mean: float
    strata: tuple[float, ...]
    num_clips: int
    num_files: int
    is_best: bool
    to_first: Difference | None = None
    to_best: Difference | None = None
    experts: tuple[str, ...] = ()

    @property
    def by_expert(self) -> dict[str, float]:
        """Mean loss of each expert's strata; empty if a single model is trained."""
        count = len(self.strata) // max(1, len(self.experts))
        parts = (self.strata[index * count : (index + 1) * count] for index in range(len(self.experts)))
        return {expert: sum(part) / count for expert, part in zip(self.experts, parts, strict=True)}

    @property
    def verdict(self) -> str:
        """Verdict against the best so far: improved, unclear or worse; first; or not finite."""
        if not math.isfinite(self.mean):
            return "not finite"
        return self.to_best.verdict if self.to_best else "first"

    def row(self) -> dict[str, Any]:
        """Return the row of the metrics file."""
        values = {
            "loss": _finite(self.mean),
            "strata": [_finite(value) for value in self.strata],
            "clips": self.num_clips,
            "files": self.num_files,
            "verdict": self.verdict,
            "is_best": self.is_best,
            "to_first": self.to_first.row() if self.to_first else None,
            "to_best": self.to_best.row() if self.to_best else None,
        }
        if self.experts:
            values["experts"] = {expert: _finite(value) for expert, value in self.by_expert.items()}
        return {"step": self.step, "validation": values}

    def describe(self) -> str:
        """Describe the evaluation in one line for the log."""
        told = f"validation loss {self.mean:.5f} at step {self.step}"
        if self.experts:
            each = (f"{expert.replace('_', ' ')} {value:.5f}" for expert, value in self.by_expert.items())
            told += f" ({', '.join(each)})"
        if self.verdict == "not finite":
            return f"{told}: NaN or Inf"
        if self.to_best is None:
            return f"{told}, over {self.num_clips} clips of {self.num_files} files"
        told = f"{told}: {self.verdict}, {self._change(self.to_best, 'the best so far')}"
        if self.to_first is None or self.to_first.step == self.to_best.step:
            return told
        return f"{told}; {self._change(self.to_first, 'the first')}"

    def _change(self, to: Difference, label: str) -> str:
        interval = f"95% interval {to.low:+.5f} to {to.high:+.5f}" if self.num_files > 1 else "no interval for one file"
        return f"{abs(to.mean):.5f} {'below' if to.mean < 0 else 'above'} {label}, of step {to.step} ({interval})"


@dataclass(frozen=True)
class Reference:
    """Losses (N, K) of an earlier evaluation to compare with."""

    step: int
    losses: Losses

    @property
    def mean(self) -> float:
        return float(self.losses.mean(dtype=np.float64))


class History:
    """Compare each evaluation with the first, the best, and the last significant improvement.

    `files` (N,) names the source file of each clip. Clips of one file are correlated, so the bootstrap resamples files.
    All results are deterministic in the losses and `seed`, hence equal on all processes.
    """

    def __init__(self, files: Sequence[str], *, seed: int) -> None:
        names, numbers = np.unique(np.asarray(files, dtype=object).astype(str), return_inverse=True)
        self._numbers, self.num_files = numbers, len(names)
        self._seed = seed
        self._references: dict[str, Reference] = {}
        self.since = 0
        self.means: list[tuple[int, float]] = []

    @cached_property
    def _draws(self) -> NDArray[np.int64]:
        return draw_files(self.num_files, seed=self._seed)

    @property
    def best_step(self) -> int | None:
        """The step of the lowest mean loss so far."""
        return self._references["best"].step if self._references else None

    def add(self, step: int, losses: Losses, *, experts: Sequence[str] = ()) -> Evaluation:
        """Compare losses (N, K) at a step with earlier ones and keep what later comparisons need. With two `experts`
        the first half of the columns is the first expert's.

        `since` counts the evaluations since the last significant improvement over the previous significant one, so that
        many small improvements add up to one.
        """
        now, known = Reference(step, losses), dict(self._references)
        is_best = not known or _is_better(now, known["best"])
        evaluation = Evaluation(
            step=step,
            mean=now.mean,
            strata=tuple(map(float, losses.mean(axis=0, dtype=np.float64))),
            num_clips=len(losses),
            num_files=self.num_files,
            is_best=is_best,
            to_first=self.compare(losses, known["first"]) if known else None,
            to_best=self.compare(losses, known["best"]) if known and math.isfinite(known["best"].mean) else None,
            experts=tuple(experts),
        )
        self._references.setdefault("first", now)
        if is_best:
            self._references["best"] = now
        if not known or self._is_sure(now, known["mark"]):
            self._references["mark"], self.since = now, 0
        else:
            self.since += 1
        self.means.append((step, now.mean))
        return evaluation

    def compare(self, losses: Losses, earlier: Reference) -> Difference:
        """Return the paired difference to an earlier evaluation of the same clips with the same noise."""
        differences = (losses.astype(np.float64) - earlier.losses).mean(axis=1)
        sums, sizes = np.bincount(self._numbers, differences), np.bincount(self._numbers)
        return Difference(earlier.step, float(differences.mean()), *find_interval(sums, sizes, self._draws))

    def _is_sure(self, now: Reference, mark: Reference) -> bool:
        if not math.isfinite(mark.mean):
            return math.isfinite(now.mean)
        return self.compare(now.losses, mark).verdict == "improved"

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later comparisons depend on."""
        references = {
            name: {"step": reference.step, "losses": torch.from_numpy(reference.losses.copy())}
            for name, reference in self._references.items()
        }
        return {"references": references, "since": self.since, "means": [list(pair) for pair in self.means]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._references = {
            name: Reference(int(kept["step"]), kept["losses"].cpu().numpy())
            for name, kept in state["references"].items()
        }
        self.since = int(state["since"])
        self.means = [(int(step), float(mean)) for step, mean in state["means"]]


def draw_files(num_files: int, *, seed: int) -> NDArray[np.int64]:
    """Return the count of each file in each of `NUM_DRAWS` bootstrap resamples, (NUM_DRAWS, num_files)."""
    digest = hashlib.blake2b(f"bootstrap/{seed}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
    return generator.multinomial(num_files, np.full(num_files, 1 / num_files), size=NUM_DRAWS)


def find_interval(sums: NDArray[Any], sizes: NDArray[Any], draws: NDArray[np.int64]) -> tuple[float, float]:
    """Return the 95% interval of sum(sums) / sum(sizes), a mean over clips, by a bootstrap over their files.

    The percentile interval is widened around the mean by sqrt(n/(n-1)) and the ratio of Student's t to the normal
    quantile, since a bootstrap over few files is too narrow (Hesterberg 2014, arXiv 1411.5279). For one file it is
    infinite.
    """
    n = len(sums)
    if n < 2:
        return -math.inf, math.inf
    mean = sums.sum() / sizes.sum()
    low, high = np.quantile((draws @ sums) / (draws @ sizes), TAILS)
    factor = math.sqrt(n / (n - 1)) * student(n - 1) / _NORMAL
    return float(mean + factor * (low - mean)), float(mean + factor * (high - mean))


def student(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t; beyond the table by its expansion (Abramowitz and Stegun, 26.7.5)."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _is_better(now: Reference, earlier: Reference) -> bool:
    return math.isfinite(now.mean) and not now.mean >= earlier.mean


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
