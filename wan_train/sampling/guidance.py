"""Classifier-free guidance (Ho and Salimans 2022), and on which steps it is applied."""

from collections.abc import Callable

from wan_train.cli import InputError, choose


def _ends(steps: int, applied: int, *, first: bool) -> list[bool]:
    return [(index < applied) if first else (index >= steps - applied) for index in range(steps)]


def _centre(steps: int, inside: int, *, value: bool) -> list[bool]:
    start = (steps - inside) // 2
    return [value if start <= index < start + inside else not value for index in range(steps)]


def _alternate(steps: int, ratio: float) -> list[bool]:
    # Plain float sums: users' recipes were tuned with their rounding, so the pattern keeps it.
    weight, spent, pattern = 0.0, 0, []
    for _ in range(steps):
        weight += ratio
        pattern.append(weight - spent >= 1)
        spent += pattern[-1]
    return pattern


_PATTERNS: dict[str, Callable[[int, int, float], list[bool]]] = {
    "none": lambda steps, applied, ratio: [True] * steps,
    "early": lambda steps, applied, ratio: _ends(steps, applied, first=False),
    "late": lambda steps, applied, ratio: _ends(steps, applied, first=True),
    "early_late": lambda steps, applied, ratio: _centre(steps, applied, value=True),
    "middle": lambda steps, applied, ratio: _centre(steps, steps - applied, value=False),
    "alternate": lambda steps, applied, ratio: _alternate(steps, ratio),
}


def guided_steps(steps: int, mode: str = "none", ratio: float | None = None) -> list[bool]:
    """For each of `steps` steps, whether it is guided.

    The mode names what is skipped: `early` skips the first steps, `late` the last, `middle` the middle, `early_late`
    both ends; `alternate` spreads the skips. `ratio` in [0, 1] is the share of steps that are guided. Without a ratio,
    or with mode `none`, all are.
    """
    pattern = choose("CFG skip mode", mode, _PATTERNS)
    if mode == "none" or ratio is None:
        return [True] * steps
    if not 0 <= ratio <= 1:
        raise InputError(f"the share of guided steps is between 0 and 1, not {ratio}")
    return pattern(steps, int(steps * ratio), ratio)
