"""Reuse schedules: which steps of which passes reuse an earlier result.

They are known before the first step: TeaCache decides by the time embedding, MagCache by previously measured ratios,
the attention cache by the step index, auto by a profile. So no step synchronises with the device, all processes of a
video decide alike, and the number of computed steps is logged in advance.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from wan_train.sampling.guidance import Guidance, StepPlan, pass_names
from wan_train.sampling.passes import PassName

CONSTANT, LINEAR = 0, 1  # orders of extrapolation

# Published with TeaCache (Liu et al. 2024), for the modulation as input; highest power first.
TEACACHE_COEFFICIENTS = {
    "Wan2.1-T2V-1.3B": (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
    "Wan2.1-T2V-14B": (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
    "Wan2.1-I2V-14B-480P": (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
    "Wan2.1-I2V-14B-720P": (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
}


@dataclass(frozen=True)
class Phase:
    """The steps of a request that use one model: their plans, their guidance, and the request's number of steps."""

    plans: Sequence[StepPlan]
    guidance: Guidance
    total: int

    @property
    def steps(self) -> list[int]:
        """Indices of the steps in the request."""
        return [plan.index for plan in self.plans]

    @property
    def passes(self) -> dict[PassName, list[int]]:
        """The steps at which each pass runs."""
        found: dict[PassName, list[int]] = {}
        for plan in self.plans:
            for name in pass_names(plan, self.guidance):
                found.setdefault(name, []).append(plan.index)
        return found

    def always_computed(self, step: int) -> bool:
        """Whether no cache may skip a step: the first of the phase and the last of the request."""
        return step in (self.steps[0], self.total - 1)


@dataclass(frozen=True)
class Count:
    """The number of computed and reused passes; the windows of a long video count as one pass."""

    computed: int = 0
    reused: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.computed + other.computed, self.reused + other.reused)


@dataclass(frozen=True)
class Schedule:
    """For each pass the reused steps, with the order of extrapolation; all other steps are computed."""

    reused: Mapping[PassName, Mapping[int, int]]

    def order(self, name: PassName, step: int) -> int | None:
        """Return the order of extrapolation of a pass at a step; None if it is computed."""
        return self._of(name).get(step)

    def is_awaited(self, name: PassName, step: int) -> bool:
        """Whether a later step reuses this pass."""
        return any(later > step for later in self._of(name))

    def is_linear(self, name: PassName) -> bool:
        """Whether any step of a pass is linearly extrapolated."""
        return LINEAR in self._of(name).values()

    def count(self, phase: Phase) -> Count:
        """Return the number of computed and reused passes of a phase."""
        reused = sum(len(self._of(name)) for name in phase.passes)
        return Count(sum(map(len, phase.passes.values())) - reused, reused)

    def num_computed_steps(self, phase: Phase) -> int:
        """Return the number of steps of a phase with at least one computed pass."""
        return len({s for name, steps in phase.passes.items() for s in steps if self.order(name, s) is None})

    def _of(self, name: PassName) -> Mapping[int, int]:
        return self.reused.get(PassName(name.prompts, name.skips), {})


class Rule(Protocol):
    """The reuse decision of a cache for one pass, step by step."""

    def pass_step(self, step: int, *, runs: bool) -> None:
        """Advance to a step; `runs` tells whether the pass runs there."""

    def may_reuse(self, step: int) -> bool:
        """Whether the accumulated error allows reuse."""

    def reset(self, step: int) -> None:
        """Reset the state, because the pass is computed."""


def follow(phase: Phase, make_rule: Callable[[PassName], Rule]) -> Schedule:
    """Return the schedule of a rule; each pass has its own state, which also advances at steps where it does not run.

    A reused step takes the residual of the last step at which the pass was computed.
    """
    return Schedule({name: _follow(phase, steps, make_rule(name)) for name, steps in phase.passes.items()})


def _follow(phase: Phase, runs: Sequence[int], rule: Rule) -> dict[int, int]:
    reused, is_known = {}, False
    for step in phase.steps:
        rule.pass_step(step, runs=step in runs)
        if step not in runs:
            continue
        if is_known and not phase.always_computed(step) and rule.may_reuse(step):
            reused[step] = CONSTANT
        else:
            rule.reset(step)
            is_known = True
    return reused


class TeaCache:
    """Reuse while the accumulated polynomial of the modulation's relative change is below a threshold.

    acc += p(mean|m_s - m_(s-1)| / mean|m_(s-1)|), reset to 0 when the pass is computed (Liu et al. 2024).
    """

    def __init__(self, changes: Mapping[int, float], coefficients: Sequence[float], threshold: float) -> None:
        self._changes, self._polynomial, self._threshold = changes, np.poly1d(coefficients), threshold
        self._sum = 0.0

    def pass_step(self, step: int, *, runs: bool) -> None:
        if step in self._changes:
            self._sum += float(self._polynomial(self._changes[step]))

    def may_reuse(self, step: int) -> bool:
        # The polynomials are negative for small changes, and a threshold of 0 must not reuse anything.
        return self._threshold > 0 and self._sum < self._threshold

    def reset(self, step: int) -> None:
        self._sum = 0.0


def relative_changes(steps: Sequence[int], modulation: Tensor) -> dict[int, float]:
    """Return mean|m_s - m_(s-1)| / mean|m_(s-1)| of modulations (S, ...), by step except the first."""
    rows = modulation.float().flatten(1)
    changes = (rows[1:] - rows[:-1]).abs().mean(1) / rows[:-1].abs().mean(1)
    return dict(zip(steps[1:], changes.tolist(), strict=True))


class MagCache:
    """Reuse while the accumulated magnitude error is below a threshold, for at most `longest` consecutive steps.

    R *= r_s, err += |1 - R|; R is reset to 1 and err to 0 when the pass is computed (Ma et al. 2025). `ratios` are r_s
    by step, the mean ratio of residual norms at a step and the previous one; a step without a ratio is computed.
    """

    def __init__(self, ratios: Mapping[int, float], retained: Sequence[int], threshold: float, longest: int) -> None:
        self._ratios, self._retained, self._threshold, self._longest = ratios, retained, threshold, longest
        self._ratio, self._error, self._length = 1.0, 0.0, 0

    def pass_step(self, step: int, *, runs: bool) -> None:
        if runs:
            self._ratio *= self._ratios.get(step, 1.0)
            self._error += abs(1 - self._ratio)
            self._length += 1

    def may_reuse(self, step: int) -> bool:
        known = step in self._ratios and step not in self._retained
        return known and self._error < self._threshold and self._length <= self._longest

    def reset(self, step: int) -> None:
        self._ratio, self._error, self._length = 1.0, 0.0, 0


class AttentionCache:
    """Reuse in [start, end), except at every `interval`-th step from `start`, which is computed and cached."""

    def __init__(self, start: int, end: int, interval: int) -> None:
        self._range, self._interval = range(start, end), interval
        self._computed = -1

    def pass_step(self, step: int, *, runs: bool) -> None:
        """Do nothing: only the step index matters."""

    def may_reuse(self, step: int) -> bool:
        if step not in self._range:
            return False
        # A pass that did not run at the computed step of this interval has no output to reuse.
        return self._computed >= step - (step - self._range.start) % self._interval and self._computed < step

    def reset(self, step: int) -> None:
        self._computed = step
