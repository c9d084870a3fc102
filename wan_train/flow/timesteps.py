"""Timestep sampling for training (`--timestep_sampling`), and the resolution-dependent shift.

Each sampling is a distribution of t over (0, 1) that maps uniform samples to levels by its inverse CDF. Strata of the
unit interval are therefore strata of t, and a part of a distribution is sampled exactly, without rejection.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Protocol, TypeVar

from torch import Tensor

NUM_TIMESTEPS = 1000  # the DiT reads t scaled to 0..1000
SMALLEST = 2.0**-25  # half the resolution of torch.rand, whose 0 would be a level without noise
BISECTIONS = 32  # to 1e-8 of a logit, finer than float32

Number = TypeVar("Number", float, Tensor)


def shift(t: Number, factor: float) -> Number:
    """Shift t in [0, 1] towards noise: s t / (1 + (s-1) t) (Esser et al. 2024, eq. 23). Factor 1 is the identity."""
    return factor * t / (1 + (factor - 1) * t)


class Distribution(Protocol):
    """A distribution of t over [0, 1]; both functions are increasing and inverse to each other.

    They take a single number, so that the level of a sample is bit-exact in any batch.
    """

    def quantile(self, u: float) -> float:
        """Return the t below which the share u lies, u in (0, 1)."""
        ...

    def cdf(self, t: float) -> float:
        """Return the share below t."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class LogitNormals:
    """Logit-normal t (Esser et al. 2024, section 3.1), or a mixture of several, with their shares.

    Shifting t by a factor adds the logarithm of the factor to the logit.
    """

    means: tuple[float, ...]
    widths: tuple[float, ...]
    shares: tuple[float, ...] = (1.0,)

    def quantile(self, u: float) -> float:
        z = NormalDist().inv_cdf(u)
        each = [mean + width * z for mean, width in zip(self.means, self.widths, strict=True)]
        # A mixture's quantile lies between those of its parts.
        return _sigmoid(each[0] if len(each) == 1 else _solve(self._share_below, u, min(each), max(each)))

    def cdf(self, t: float) -> float:
        return t if t in (0, 1) else self._share_below(math.log(t / (1 - t)))

    def _share_below(self, logit: float) -> float:
        parts = zip(self.means, self.widths, self.shares, strict=True)
        return sum(share / 2 * math.erfc((mean - logit) / (width * math.sqrt(2))) for mean, width, share in parts)


@dataclass(frozen=True)
class Uniform:
    """Uniform t, concentrated in the middle by `mode_scale` (Esser et al. 2024, eq. 20), then shifted."""

    shift: float = 1.0
    mode_scale: float = 0.0  # increasing for values from -1 to 2 / (pi - 2)

    def quantile(self, u: float) -> float:
        return shift(self._bend(u), self.shift)

    def cdf(self, t: float) -> float:
        before = shift(t, 1 / self.shift)
        return _solve(self._bend, before, 0, 1) if self.mode_scale else before

    def _bend(self, u: float) -> float:
        return u + self.mode_scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)


def _sigmoid(logit: float) -> float:
    small = math.exp(-abs(logit))
    return (small if logit < 0 else 1) / (1 + small)


def _solve(rising: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Return where an increasing function has a value between `low` and `high`, by bisection."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Parameters:
    """Parameters of all samplings; each uses its own. `size` is (height, width) of the latents."""

    size: tuple[int, int] = (128, 128)
    shift: float = 1.0
    sigmoid_scale: float = 1.0
    density: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29


def resolution_mean(size: tuple[int, int]) -> float:
    """Return the logarithm of FLUX.1's shift for a latent size: linear from 0.5 at 256 tokens to 1.15 at 4096.

    Tokens are the 2x2 patches of one frame; the number of frames has no effect.
    """
    tokens = (size[0] // 2) * (size[1] // 2)
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


def _sigma(p: Parameters) -> Distribution:
    """Return the distribution of 1 - d, d drawn with the `density` of `--weighting_scheme`, then shifted.

    The levels are not rounded to a table of 1000.
    """
    if p.density == "logit_normal":
        return LogitNormals((math.log(p.shift) - p.logit_mean,), (p.logit_std,))
    return Uniform(p.shift, p.mode_scale if p.density == "mode" else 0.0)


def _qinglong(p: Parameters) -> Distribution:
    """Mix 79% flux_shift, 11% logsnr, and 10% logsnr of mean 5.36 and standard deviation 1, which is near the data."""
    means = (resolution_mean(p.size), -p.logit_mean / 2, -5.36 / 2)
    return LogitNormals(means, (p.sigmoid_scale, p.logit_std / 2, 1 / 2), (0.79, 0.11, 0.10))


# logsnr: log(snr) = 2 log((1-t) / t) ~ N(mean, std), that is t = sigmoid(-log(snr) / 2).
SAMPLERS: dict[str, Callable[[Parameters], Distribution]] = {
    "uniform": lambda p: Uniform(),
    "sigmoid": lambda p: LogitNormals((0.0,), (p.sigmoid_scale,)),
    "shift": lambda p: LogitNormals((math.log(p.shift),), (p.sigmoid_scale,)),
    "sigma": _sigma,
    "flux_shift": lambda p: LogitNormals((resolution_mean(p.size),), (p.sigmoid_scale,)),
    "logsnr": lambda p: LogitNormals((-p.logit_mean / 2,), (p.logit_std / 2,)),
    "qinglong_flux": _qinglong,
}


@dataclass(frozen=True)
class Span:
    """The range of t within [0, 1]: the distribution is rescaled to it, or with `keep_shape` truncated to it."""

    low: float = 0.0
    high: float = 1.0
    keep_shape: bool = False


def level(u: float, distribution: Distribution, span: Span) -> float:
    """Return the t within the span for a uniform u in [0, 1); it increases with u."""
    u = max(u, SMALLEST)
    if not span.keep_shape:
        return span.low + distribution.quantile(u) * (span.high - span.low)
    low, high = shares_below(distribution, span)
    return min(max(distribution.quantile(low + u * (high - low)), span.low), span.high)


@lru_cache
def shares_below(distribution: Distribution, span: Span) -> tuple[float, float]:
    """Return the shares of a distribution below the lower and the upper end of the span."""
    return distribution.cdf(span.low), distribution.cdf(span.high)
