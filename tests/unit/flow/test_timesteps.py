"""Samplings against their formulas, each drawn the plain way by its own code here."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wan_train.flow.timesteps import SAMPLERS, Distribution, Parameters, Span, level, resolution_mean
from wan_train.training.settings import TIMESTEP_SAMPLINGS, WEIGHTING_SCHEMES, TimestepSettings

COUNT = 4000
EVEN = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
Plain = Callable[[np.ndarray], np.ndarray]


def levels(u: Tensor, made: Distribution, span: Span) -> Tensor:
    return torch.tensor([level(number, made, span) for number in u.tolist()], dtype=torch.float64)


def cdf(made: Distribution, t: Tensor) -> Tensor:
    return torch.tensor([made.cdf(number) for number in t.tolist()], dtype=torch.float64)


def quantile(made: Distribution, u: Tensor) -> Tensor:
    return torch.tensor([made.quantile(number) for number in u.tolist()], dtype=torch.float64)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def shifted(x: np.ndarray, factor: float) -> np.ndarray:
    return factor * x / (1 + (factor - 1) * x)


def by_index(u: np.ndarray) -> np.ndarray:
    """A level from a schedule of 1000 that begins with noise."""
    return (1000 - np.floor(u * 1000)) / 1000


def normal(u: np.ndarray, mean: float = 0.0, deviation: float = 1.0) -> np.ndarray:
    return mean + deviation * torch.special.ndtri(torch.from_numpy(u)).numpy()


def qinglong(u: np.ndarray) -> np.ndarray:
    """At 60x104, scale 0.8, logsnr of mean 1 and deviation 2."""
    parts = [(np.arange(count) + 0.5) / count for count in (COUNT * 79 // 100, COUNT * 11 // 100, COUNT // 10)]
    flux = shifted(sigmoid(0.8 * normal(parts[0])), 2.0559)
    return np.concatenate([flux, sigmoid(-normal(parts[1], 1, 2) / 2), sigmoid(-normal(parts[2], 5.36, 1) / 2)])


def mode(u: np.ndarray) -> np.ndarray:
    return 1 - u - 1.29 * (np.cos(np.pi * u / 2) ** 2 - 1 + u)


CASES: list[tuple[str, dict[str, Any], Plain]] = [
    ("uniform", {}, lambda u: u),
    ("uniform", {"shift": 5.0}, lambda u: u),
    ("sigmoid", {"sigmoid_scale": 0.5, "shift": 5.0}, lambda u: sigmoid(0.5 * normal(u))),
    ("shift", {"sigmoid_scale": 1.3, "shift": 3.0}, lambda u: shifted(sigmoid(1.3 * normal(u)), 3.0)),
    ("flux_shift", {"size": (60, 104)}, lambda u: shifted(sigmoid(normal(u)), 2.0559)),
    ("flux_shift", {"size": (90, 160), "shift": 9.0}, lambda u: shifted(sigmoid(normal(u)), 2.9039)),
    ("logsnr", {"logit_mean": 1.5, "logit_std": 0.7}, lambda u: sigmoid(-normal(u, 1.5, 0.7) / 2)),
    ("qinglong_flux", {"size": (60, 104), "sigmoid_scale": 0.8, "logit_mean": 1.0, "logit_std": 2.0}, qinglong),
    ("sigma", {}, lambda u: by_index(u)),
    ("sigma", {"density": "cosmap", "shift": 3.0}, lambda u: shifted(by_index(u), 3.0)),
    (
        "sigma",
        {"density": "logit_normal", "logit_mean": 0.5, "logit_std": 0.8, "shift": 2.0},
        lambda u: shifted(by_index(sigmoid(normal(u, 0.5, 0.8))), 2.0),
    ),
    ("sigma", {"density": "mode"}, lambda u: by_index(mode(u))),
    ("sigma", {"density": "mode", "shift": 4.0}, lambda u: shifted(by_index(mode(u)), 4.0)),
]


@pytest.mark.parametrize(("name", "options", "plain"), CASES)
def test_a_sampling_follows_its_formula(name: str, options: dict[str, Any], plain: Plain) -> None:
    """Kolmogorov-Smirnov, to evenly spread numbers; a table of 1000 levels is off by a thousandth of t."""
    expected = torch.from_numpy(np.sort(plain(EVEN.numpy())))
    assert (cdf(SAMPLERS[name](Parameters(**options)), expected) - EVEN).abs().max() < 0.005


def all_distributions() -> list[Distribution]:
    return [SAMPLERS[name](Parameters(**options)) for name, options, _ in CASES]


@pytest.mark.parametrize("made", all_distributions())
def test_quantile_and_cdf_undo_each_other_and_rise(made: Distribution) -> None:
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t = quantile(made, u)
    assert (t.diff() > 0).all()
    assert t[0] > 0 and t[-1] < 1
    torch.testing.assert_close(cdf(made, t), u, rtol=0, atol=1e-7)
    assert cdf(made, torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == pytest.approx([0, 1], abs=1e-9)


@pytest.mark.parametrize("made", all_distributions())
def test_levels_stay_in_their_range_and_a_kept_shape_fills_it(made: Distribution) -> None:
    u = torch.tensor([0.0, 0.5, 1 - 2.0**-24]).double()
    for keep_shape, slack in ((False, 0.3), (True, 0.01)):
        t = levels(u, made, Span(0.3, 0.6, keep_shape))
        assert 0.3 <= t.min() < 0.3 + slack and 0.6 - slack < t.max() <= 0.6


@pytest.mark.parametrize("made", all_distributions())
def test_a_kept_shape_is_what_rejection_would_leave(made: Distribution) -> None:
    everything = levels(EVEN, made, Span())
    left = everything[(everything >= 0.25) & (everything <= 0.7)]
    even = (torch.arange(len(left), dtype=torch.float64) + 0.5) / len(left)
    kept = levels(even, made, Span(0.25, 0.7, keep_shape=True))
    torch.testing.assert_close(cdf(made, kept), cdf(made, left), rtol=0, atol=1 / COUNT)


@pytest.mark.parametrize("made", all_distributions())
def test_without_a_kept_shape_everything_is_squeezed_into_the_range(made: Distribution) -> None:
    u = torch.rand(100).double()
    torch.testing.assert_close(levels(u, made, Span(0.25, 0.75)), 0.25 + 0.5 * quantile(made, u))


def test_strata_of_uniform_numbers_are_strata_of_the_distribution() -> None:
    """Even of a mixture."""
    made = SAMPLERS["qinglong_flux"](Parameters())
    strata = torch.arange(8, dtype=torch.float64).repeat_interleave(50)
    t = levels((strata + torch.rand(400)) / 8, made, Span())
    assert torch.equal((cdf(made, t) * 8).floor(), strata)


@pytest.mark.parametrize("density", ["none", "logit_normal", "mode"])
def test_the_range_of_sigma_is_not_upside_down(density: str) -> None:
    """Regression: a schedule that begins with noise trained 501 to 1000 where 0 to 500 was asked for."""
    made = SAMPLERS["sigma"](Parameters(density=density))
    for keep_shape in (False, True):
        assert levels(EVEN, made, Span(0, 0.5, keep_shape)).max() <= 0.5
        assert levels(EVEN, made, Span(0.875, 1, keep_shape)).min() >= 0.875


@pytest.mark.parametrize("density", ["none", "logit_normal", "mode"])
def test_sigma_is_shifted(density: str) -> None:
    """Regression: the shift was given and ignored."""
    plain, moved = (levels(EVEN, SAMPLERS["sigma"](Parameters(density=density, shift=s)), Span()) for s in (1.0, 3.0))
    torch.testing.assert_close(moved, 3 * plain / (1 + 2 * plain))


def test_a_mean_above_zero_is_less_noise() -> None:
    def middle(name: str, **options: Any) -> float:
        return SAMPLERS[name](Parameters(**options)).quantile(0.5)

    assert middle("logsnr", logit_mean=2.0) == pytest.approx(1 / (1 + math.e))
    assert middle("sigma", density="logit_normal", logit_mean=2.0) == pytest.approx(1 / (1 + math.exp(2)))


def test_the_shift_of_a_resolution() -> None:
    known = {(60, 104): 2.0559, (90, 160): 2.9039, (32, 32): math.exp(0.5), (128, 128): math.exp(1.15)}
    assert {size: math.exp(resolution_mean(size)) for size in known} == pytest.approx(known, abs=5e-5)


def test_no_number_gives_a_level_that_is_no_level() -> None:
    ends: Tensor = torch.tensor([0.0, 1 - 2.0**-24]).double()
    for made in all_distributions():
        t = levels(ends, made, Span()).float()
        assert t.isfinite().all() and t.min() > 0 and t.max() <= 1


def test_the_command_line_offers_what_the_tables_hold() -> None:
    assert set(TIMESTEP_SAMPLINGS) == set(SAMPLERS)
    assert {"logit_normal", "mode"} < set(WEIGHTING_SCHEMES)
    assert TimestepSettings().mode_scale == Parameters().mode_scale
