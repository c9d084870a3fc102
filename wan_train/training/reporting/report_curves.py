"""Summarise a run's metrics as numbers and curves."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wan_train.training.reporting.charts import Series, draw_chart, number, smoothed
from wan_train.training.reporting.metrics import NUM_STRATA

Row = dict[str, Any]


def steps_of(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of optimizer steps."""
    return [row for row in rows if "loss" in row]


def compare(runs: Mapping[str, list[Row]]) -> str:
    """Plot several runs together."""
    losses, held_out = [], []
    for colour, (name, rows) in enumerate(runs.items()):
        losses.append(_smooth(steps_of(rows), "loss", name, colour))
        held_out.append(Series(name, *_held_out(rows), colour, dots=True))
    return draw_chart("Loss, smoothed", losses) + draw_chart("Validation loss", held_out)


def list_facts(rows: list[Row]) -> str:
    """Return the key figures as HTML."""
    steps = steps_of(rows)
    if not steps:
        return "<p>No steps were taken.</p>"
    last = steps[-1]
    losses, seconds = _known(steps[-100:], "loss"), _known(steps, "seconds")
    facts = [
        ("steps", f"{last['step']:,}"),
        ("epoch", str(last["epoch"])),
        ("loss, mean of the last 100", number(float(losses.mean()) if len(losses) else np.nan)),
        ("s/step, median", number(float(np.median(seconds)) if len(seconds) else np.nan)),
        ("time in steps", _duration(float(seconds.sum()))),
        ("peak memory", f"{max(row.get('memory_mib') or 0 for row in steps) / 1024:.2f} GiB"),
    ]
    measured = [row for row in _measured(rows) if row["validation"].get("loss") is not None]
    if measured:
        best = min(measured, key=lambda row: float(row["validation"]["loss"]))
        facts.append(("validation loss, best", f"{number(best['validation']['loss'])} at step {best['step']}"))
    items = "".join(f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd></div>" for key, value in facts)
    return f"<dl>{items}</dl>"


def draw_charts(rows: list[Row]) -> list[str]:
    """Return all charts that have data, as HTML."""
    steps = steps_of(rows)
    if not steps:
        return []
    at = _column(steps, "step")
    rates = sorted({name for row in steps for name in row.get("learning_rates") or {}})
    rate_curves = [Series(name, at, _column(steps, "learning_rates", name), i) for i, name in enumerate(rates)]
    return [
        draw_chart("Loss", _each_and_smooth(steps, "loss", colour=0)),
        draw_chart("Validation loss, with the 95% interval of its change since the first", [_with_interval(rows)]),
        draw_chart("Loss by noise level, smoothed", [_stratum(steps, index) for index in range(NUM_STRATA)]),
        draw_chart("Validation loss by noise level", _held_out_strata(rows)),
        draw_chart("Learning rate", rate_curves or [Series("all", at, _column(steps, "lr"), 0)], from_zero=True),
        draw_chart("Gradient norm", _each_and_smooth(steps, "grad_norm", colour=1), from_zero=True),
        draw_chart("Adapter norm", [Series("norm", at, _column(steps, "adapter_norm"), 2)], from_zero=True),
        draw_chart("Seconds per step", [_smooth(steps, "seconds", colour=3)], from_zero=True),
        draw_chart("Tokens per second", [_smooth(steps, "tokens_per_second", colour=4)], from_zero=True),
        draw_chart("Peak memory, GiB", [Series("peak", at, _column(steps, "memory_mib") / 1024, 5)], from_zero=True),
    ]


def _column(rows: Sequence[Row], *path: str) -> np.ndarray:
    """Return one value of each row, NaN if it is missing."""

    def number_at(row: Any) -> float:
        for key in path:
            row = row.get(key) if isinstance(row, dict) else None
        return float(row) if isinstance(row, int | float) else np.nan

    return np.array([number_at(row) for row in rows], dtype=float)


def _known(rows: Sequence[Row], *path: str) -> np.ndarray:
    values = _column(rows, *path)
    return values[np.isfinite(values)]


def _smooth(steps: list[Row], column: str, name: str = "smoothed", colour: int = 0) -> Series:
    return Series(name, _column(steps, "step"), smoothed(_column(steps, column), max(1, len(steps) // 25)), colour)


def _each_and_smooth(steps: list[Row], column: str, *, colour: int) -> list[Series]:
    each = Series("each step", _column(steps, "step"), _column(steps, column), colour, faint=True)
    return [each, _smooth(steps, column, colour=colour)]


def _stratum(steps: list[Row], index: int) -> Series:
    """Return the losses of an eighth of t. A step has few samples, so most steps have none in it."""
    drawn = [row for row in steps if f"t{index}" in (row.get("strata") or {})]
    values = _column(drawn, "strata", f"t{index}")
    name = f"t {index / NUM_STRATA:.3g} to {(index + 1) / NUM_STRATA:.3g}"
    return Series(name, _column(drawn, "step"), smoothed(values, max(1, len(drawn) // 12)), index)


def _measured(rows: list[Row]) -> list[Row]:
    """Return the rows of validation."""
    return [row for row in rows if isinstance(row.get("validation"), dict)]


def _held_out(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    measured = _measured(rows)
    return _column(measured, "step"), _column(measured, "validation", "loss")


def _with_interval(rows: list[Row]) -> Series:
    measured = _measured(rows)
    steps, values = _held_out(rows)
    first = values[0] if len(values) else np.nan
    low, high = (first + _column(measured, "validation", "to_first", edge) for edge in ("low", "high"))
    return Series("held out", steps, values, 6, dots=True, low=low, high=high)


def _held_out_strata(rows: list[Row]) -> list[Series]:
    measured = [row for row in _measured(rows) if row["validation"].get("strata")]
    count = min((len(row["validation"]["strata"]) for row in measured), default=0)
    steps = _column(measured, "step")
    table = [[np.nan if v is None else float(v) for v in row["validation"]["strata"][:count]] for row in measured]
    return [
        Series(f"t {i / count:.3g} to {(i + 1) / count:.3g}", steps, np.array([row[i] for row in table]), i, dots=True)
        for i in range(count)
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
