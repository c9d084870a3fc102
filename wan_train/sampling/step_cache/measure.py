"""Measure, during a run without a cache, the errors that reusing residuals would cause."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

from torch import Tensor, nn

from wan_train.models.dit.dit import Dit, Embedded, RunBlocks, wrap_run_blocks
from wan_train.sampling.guidance import combine, pass_names
from wan_train.sampling.passes import PassName
from wan_train.sampling.step_cache.planning import LONGEST, WIDEST
from wan_train.sampling.step_cache.profile import Entry, ReuseError
from wan_train.sampling.step_cache.residuals import PassAware, extrapolated
from wan_train.sampling.step_cache.schedule import CONSTANT, LINEAR, Phase

_Way = tuple[int, int]  # age and gap of `ReuseError`


def written_name(name: PassName) -> str:
    """Return a pass's name in a profile, the same for all windows."""
    return "+".join(name.prompts) + (" skipping layers" if name.skips else "")


@dataclass
class Measurement:
    """Measurements of one video so far: squared L2 errors of its latents, summed over windows; ratios of residual
    norms; number of passes by step."""

    squared: dict[tuple[int, int, int], float] = field(default_factory=lambda: defaultdict(float))
    ratios: dict[str, dict[int, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    num_passes: dict[int, int] = field(default_factory=dict)

    def entry(self, settings: Mapping[str, str], models: Mapping[str, str], latents: Tensor) -> Entry:
        """Return the entry of a run with these final latents."""
        norm = float(latents.norm())
        rows = [ReuseError(*key, square**0.5 / norm) for key, square in sorted(self.squared.items())]
        ratios = {name: {s: sum(r) / len(r) for s, r in steps.items()} for name, steps in self.ratios.items()}
        return Entry(settings, models, [self.num_passes[step] for step in sorted(self.num_passes)], rows, ratios)


def joined(entries: Sequence[Entry]) -> Entry:
    """Combine entries of several videos with the same settings: the largest errors, the mean ratios."""
    errors: dict[tuple[int, int, int], float] = {}
    for row in (row for entry in entries for row in entry.errors):
        key = (row.step, row.age, row.gap)
        errors[key] = max(row.error, errors.get(key, 0.0))
    first = entries[0]
    ratios = {
        name: {step: sum(entry.ratios[name][step] for entry in entries) / len(entries) for step in steps}
        for name, steps in first.ratios.items()
    }
    rows = [ReuseError(*key, error) for key, error in errors.items()]
    return replace(first, errors=rows, ratios=ratios, num_videos=len(entries))


class Recorder(PassAware):
    """Computes every pass and adds to a measurement, for the steps of one model.

    For each step it computes the velocities that earlier residuals would give, with the head alone, and combines their
    differences from the true velocities by the step's guidance. Earlier residuals are kept in CPU RAM: 2 LONGEST + 1
    per pass.
    """

    def __init__(self, into: Measurement, phase: Phase, sigmas: Tensor) -> None:
        self._into, self._guidance, self._sigmas = into, phase.guidance, sigmas.tolist()
        self._plans = {plan.index: plan for plan in phase.plans}
        self._known: dict[PassName, list[tuple[int, Tensor]]] = {}
        self._open: dict[PassName, dict[_Way, Tensor]] = {}
        self._step = -1

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """Measure every pass of the model inside the context."""
        self._model = cast(Dit, model)
        with wrap_run_blocks(self._model, self._measuring):
            yield
        self._close()

    def _measuring(self, run: RunBlocks) -> RunBlocks:
        def measure(state: Embedded) -> None:
            if self.current.step != self._step:
                self._close()
                self._step = self.current.step
            before = state.tokens
            run(state)
            self._compare(state, before)

        return measure

    def _compare(self, state: Embedded, before: Tensor) -> None:
        name, step = self.current.name, self.current.step
        known = self._known.setdefault(name, [])
        residual, velocity = state.tokens - before, self._model.finish(state)
        if known and known[-1][0] == step - 1:
            earlier = known[-1][1].to(residual)
            ratio = (residual.norm(dim=-1) / earlier.norm(dim=-1)).mean()
            self._into.ratios[written_name(name)][step].append(float(ratio))
        ways = self._open.setdefault(name, {})
        for way in self._ways(known, step):
            age, gap = way
            steps = [step - age - gap, step - age] if gap else [step - age]
            pair = [(other, kept.to(residual)) for other, kept in known if other in steps]
            guess = extrapolated(pair, step, LINEAR if gap else CONSTANT, self._sigmas)
            ways[way] = self._model.finish(replace(state, tokens=before + guess)) - velocity
        known.append((step, residual.cpu()))
        del known[: -(LONGEST + WIDEST)]

    def _ways(self, known: Sequence[tuple[int, Tensor]], step: int) -> Iterator[_Way]:
        steps = {other for other, _ in known}
        for age in range(1, LONGEST + 1):
            if step - age in steps:
                yield age, 0
                yield from ((age, gap) for gap in range(1, WIDEST + 1) if step - age - gap in steps)

    def _close(self) -> None:
        """Combine the differences of the finished step, as far as all of its passes have them."""
        if not self._open:
            return
        step, plan = self._step, self._plans[self._step]
        names = pass_names(plan, self._guidance)
        self._into.num_passes[step] = len(names)
        length = self._sigmas[step] - self._sigmas[step + 1]
        for window in sorted({name.window for name in self._open}):
            ways = [self._open[replace(name, window=window)] for name in names]
            for way in set.intersection(*map(set, ways)):
                guided = combine([found[way] for found in ways], plan, self._guidance)
                self._into.squared[step, *way] += (length * float(guided.norm())) ** 2
        self._open.clear()
