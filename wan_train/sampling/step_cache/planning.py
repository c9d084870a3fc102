"""`--step_cache auto`: choose the steps to reuse that save the most passes within an error budget.

The error of the final latents is at most the sum of the errors of the reused steps, if later steps do not amplify
them; the profile's scale corrects for amplification. The choice is thus a shortest-path problem.
"""

from collections.abc import Collection
from dataclasses import dataclass

from wan_train.sampling.step_cache.profile import Entry
from wan_train.sampling.step_cache.schedule import CONSTANT, LINEAR

LONGEST = 4  # most consecutive reused steps that are measured
WIDEST = LONGEST + 1  # largest distance between two computed steps


@dataclass(frozen=True)
class Plan:
    """The reused steps with their orders of extrapolation, the predicted relative error and the passes saved."""

    reused: dict[int, int]
    error: float
    num_saved: int


@dataclass(frozen=True)
class _Path:
    """A path up to a step: its error, and the steps it reuses, newest first."""

    error: float = 0.0
    reused: tuple[tuple[int, int], "_Path"] | None = None


# (steps since the last computed one, from there to the one computed before it or 0) -> passes saved -> path
_Ways = dict[tuple[int, int], dict[int, _Path]]


def cheapest(entry: Entry, budget: float, firsts: Collection[int]) -> Plan:
    """Return the plan that saves the most passes with a predicted error of at most `budget`, and then the least error.

    `firsts` are the steps at which a model takes over. With a budget of 0 all steps are computed.
    """
    if budget <= 0:
        return Plan({}, 0.0, 0)
    errors = {(row.step, row.age, row.gap): row.error * entry.scale for row in entry.errors}
    total = len(entry.num_passes)
    ways: _Ways = {(0, 0): {0: _Path()}}
    for step in range(1, total):
        following: _Ways = {}
        for (age, gap), paths in ways.items():
            computed = (0, 0) if step in firsts else (0, age + 1)
            orders = {} if step in firsts or step == total - 1 else _orders(errors, step, age + 1, gap)
            for saved, path in paths.items():
                _offer(following, computed, saved, path)
                for order, error in orders.items():
                    if path.error + error <= budget:
                        longer = _Path(path.error + error, ((step, order), path))
                        _offer(following, (age + 1, gap), saved + entry.num_passes[step], longer)
        ways = following
    saved, path = max(
        ((saved, path) for paths in ways.values() for saved, path in paths.items()),
        key=lambda end: (end[0], -end[1].error),
    )
    return Plan(_steps(path), path.error, saved)


def _orders(errors: dict[tuple[int, int, int], float], step: int, age: int, gap: int) -> dict[int, float]:
    """Return the order of extrapolation with the smaller measured error, and that error, if there is one."""
    both = {CONSTANT: errors.get((step, age, 0)), LINEAR: errors.get((step, age, gap)) if gap else None}
    known = {order: error for order, error in both.items() if error is not None}
    return dict([min(known.items(), key=lambda item: item[1])]) if known else {}


def _offer(ways: _Ways, state: tuple[int, int], saved: int, path: _Path) -> None:
    paths = ways.setdefault(state, {})
    if saved not in paths or path.error < paths[saved].error:
        paths[saved] = path


def _steps(path: _Path) -> dict[int, int]:
    found = {}
    while path.reused is not None:
        (step, order), path = path.reused
        found[step] = order
    return dict(sorted(found.items()))
