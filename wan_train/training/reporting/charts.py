"""Line charts as SVG, for a self-contained page."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A figure of WIDTH x HEIGHT units, with margins around the plot for tick labels legible on a phone.
WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 92, 40, 14, 44
MOST_POINTS = 500  # of a curve: more than a screen can show


@dataclass(frozen=True)
class Series:
    """A curve: steps, values (NaN leaves a gap), name, colour index and style.

    `faint` is for raw values behind a smoothed curve, without a legend entry. `dots` is for sparse measurements, with
    `low` and `high` as error bars.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray
    colour: int = 0
    faint: bool = False
    dots: bool = False
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def draw_chart(title: str, series: Sequence[Series], *, from_zero: bool = False) -> str:
    """Return a figure of curves over steps with a legend; empty if there is nothing finite to plot."""
    shown = [curve for curve in series if np.isfinite(curve.values).any()]
    if not shown:
        return ""
    frame = _frame(shown, from_zero=from_zero)
    lines = "".join(_draw(curve, frame) for curve in shown)
    grid = "".join(_grid_line(value, frame) for value in frame.ticks_y) + "".join(
        _mark(v, frame) for v in frame.ticks_x
    )
    key = "".join(
        f'<span><i class="k{curve.colour % 8}"></i>{html.escape(curve.name)} <b>{_last(curve.values)}</b></span>'
        for curve in shown
        if not curve.faint
    )
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    # The nested svg clips curves to the plot.
    plot = f'<svg x="{LEFT}" y="{TOP}" width="{width}" height="{height}" viewBox="{LEFT} {TOP} {width} {height}">'
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{grid}{plot}{lines}</svg></svg>"
        f'<p class="key">{key}</p></figure>'
    )


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Return the running mean of the finite values in a window of `window` around each value."""
    if not len(values):
        return values
    known = np.isfinite(values)
    ones = np.ones(min(window, len(values)))
    total = np.convolve(np.where(known, values, 0.0), ones, mode="same")
    count = np.convolve(known.astype(float), ones, mode="same")
    return np.where(count > 0.5, total / np.maximum(count, 1.0), np.nan)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers in a range, spaced 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Format a number briefly."""
    if not math.isfinite(value):
        return "unknown"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


@dataclass(frozen=True)
class _Frame:
    x: tuple[float, float]
    y: tuple[float, float]

    @property
    def ticks_x(self) -> list[float]:
        return [tick for tick in nice_ticks(*self.x) if tick == round(tick)]

    @property
    def ticks_y(self) -> list[float]:
        return nice_ticks(*self.y)

    def across(self, steps: np.ndarray) -> np.ndarray:
        """Return the x coordinates of steps."""
        low, high = self.x
        return LEFT + (steps - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def down(self, values: np.ndarray) -> np.ndarray:
        """Return the y coordinates of values."""
        low, high = self.y
        return HEIGHT - BOTTOM - (values - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _frame(series: Sequence[Series], *, from_zero: bool) -> _Frame:
    """Return the range of the plot; single spikes of a faint curve may lie outside."""
    steps = np.concatenate([curve.steps for curve in series])
    spans = [span for curve in series if (span := _span(curve)) is not None]
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)
    low = min(low, 0.0) if from_zero else low
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    first, last = float(steps.min()), max(float(steps.max()), float(steps.min()) + 1)
    margin = (last - first) * 0.015  # dots at the ends are not clipped
    return _Frame((first - margin, last + margin), (low if from_zero and low == 0 else low - room, high + room))


def _span(curve: Series) -> tuple[float, float] | None:
    parts = [part for part in (curve.values, curve.low, curve.high) if part is not None]
    known = np.concatenate(parts)
    known = known[np.isfinite(known)]
    if not len(known):
        return None
    edges = (1, 99) if curve.faint else (0, 100)
    low, high = np.percentile(known, edges)
    return float(low), float(high)


def _draw(curve: Series, frame: _Frame) -> str:
    colour = f"c{curve.colour % 8}"
    if not curve.dots:
        steps, values = _thinned(curve.steps, curve.values)
        path = _path(frame.across(steps), frame.down(values))
        return f'<path class="{colour}{" faint" if curve.faint else ""}" d="{path}"/>'
    x, y = frame.across(curve.steps), frame.down(curve.values)
    parts = [f'<path class="{colour}" d="{_path(x, y)}"/>']
    if curve.low is not None and curve.high is not None:
        for at, low, high in zip(x, frame.down(curve.low), frame.down(curve.high), strict=True):
            if np.isfinite(low) and np.isfinite(high):
                parts.append(f'<path class="{colour} bar" d="M{at:.1f} {low:.1f}V{high:.1f}"/>')
    for at, to, step, value in zip(x, y, curve.steps, curve.values, strict=True):
        if np.isfinite(value):
            told = f"<title>step {step:.0f}: {number(float(value))}</title>"
            parts.append(f'<circle class="{colour}" cx="{at:.1f}" cy="{to:.1f}" r="4">{told}</circle>')
    return "".join(parts)


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduce to about MOST_POINTS points, keeping the minimum and maximum of each stretch so that spikes remain."""
    if len(steps) <= MOST_POINTS:
        return steps, values
    kept: list[int] = []
    for part in np.array_split(np.arange(len(steps)), MOST_POINTS // 2):
        known = part[np.isfinite(values[part])]
        chosen = known if len(known) else part[:1]
        kept += sorted({int(chosen[np.argmin(values[chosen])]), int(chosen[np.argmax(values[chosen])])})
    return steps[kept], values[kept]


def _path(x: np.ndarray, y: np.ndarray) -> str:
    words, pen = [], "M"
    for at, to in zip(x, y, strict=True):
        if not np.isfinite(to):
            pen = "M"
            continue
        words.append(f"{pen}{at:.1f} {to:.1f}")
        pen = "L"
    return "".join(words)


def _grid_line(value: float, frame: _Frame) -> str:
    y = float(frame.down(np.array(value)))
    return (
        f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 8}" y="{y + 6:.1f}" text-anchor="end">{number(value)}</text>'
    )


def _mark(step: float, frame: _Frame) -> str:
    x = float(frame.across(np.array(step)))
    return f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 28}" text-anchor="middle">{step:.0f}</text>'


def _last(values: np.ndarray) -> str:
    return number(float(values[np.isfinite(values)][-1]))
