from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.batching.order import SampleKey
from wan_train.conditions.conditions import Conditions
from wan_train.errors import InputError
from wan_train.training.objective.loss import Draws, check_timesteps, draw, measure
from wan_train.training.settings import TIMESTEP_SAMPLINGS, LossSettings, TimestepSettings

SHAPE = (2, 1, 3, 3)
KEYS = [SampleKey("a", 0), SampleKey("b", 0), SampleKey("b", 1)]


def mean_of(*arguments, **options) -> torch.Tensor:
    return measure(*arguments, **options).mean


def samples_of(*arguments, **options) -> torch.Tensor:
    return measure(*arguments, **options).samples


def drawn(keys: list[SampleKey], *, seed: int = 1, epoch: int = 1) -> Draws:
    return draw(keys, SHAPE, TimestepSettings(timestep_sampling="shift"), seed=seed, epoch=epoch)


@pytest.mark.parametrize("sampling", TIMESTEP_SAMPLINGS)
@pytest.mark.parametrize("keep_shape", [False, True])
def test_noise_and_t_belong_to_the_sample_not_to_its_batch(sampling: str, keep_shape: bool) -> None:
    settings = TimestepSettings(
        timestep_sampling=sampling, min_timestep=200, max_timestep=900, preserve_distribution_shape=keep_shape
    )
    together = draw(KEYS, SHAPE, settings, seed=1, epoch=1)
    for index, key in reversed(list(enumerate(KEYS))):
        alone = draw([key], SHAPE, settings, seed=1, epoch=1)
        assert torch.equal(alone.noise[0], together.noise[index])
        assert torch.equal(alone.t[0], together.t[index])


@pytest.mark.parametrize("sampling", TIMESTEP_SAMPLINGS)
@pytest.mark.parametrize("keep_shape", [False, True])
def test_the_range_is_that_of_the_options(sampling: str, keep_shape: bool) -> None:
    settings = TimestepSettings(
        timestep_sampling=sampling, min_timestep=400, max_timestep=600, preserve_distribution_shape=keep_shape
    )
    t = draw([SampleKey(str(n), 0) for n in range(500)], SHAPE, settings, seed=1, epoch=1).t
    assert t.min() >= 0.4 and t.max() <= 0.6
    assert t.unique().numel() > 480


def middle(**options: Any) -> float:
    keys = [SampleKey(str(n), 0) for n in range(500)]
    settings = TimestepSettings(**options)
    check_timesteps(settings)
    return float(draw(keys, SHAPE, settings, seed=1, epoch=1).t.median())


def test_each_option_moves_what_it_says() -> None:
    """The 500 numbers are the same each time."""
    assert middle(timestep_sampling="shift", discrete_flow_shift=3.0) > middle(timestep_sampling="shift") + 0.1
    assert middle(timestep_sampling="sigma", discrete_flow_shift=3.0) > middle(timestep_sampling="sigma") + 0.1
    logit = {"timestep_sampling": "sigma", "weighting_scheme": "logit_normal"}
    assert middle(**logit, logit_mean=1.0) < middle(**logit) - 0.1
    assert middle(timestep_sampling="logsnr", logit_mean=2.0) < middle(timestep_sampling="logsnr") - 0.1
    assert middle(timestep_sampling="logsnr", logit_mean=2.0, logit_std=0.001) == pytest.approx(0.2689, abs=1e-3)
    spread = [
        draw(KEYS, SHAPE, TimestepSettings(timestep_sampling="sigma", **options), seed=1, epoch=1).t.sub(0.5).abs()
        for options in ({}, {"weighting_scheme": "mode", "mode_scale": 0.5}, {"weighting_scheme": "mode"})
    ]
    assert (spread[0] > spread[1]).all() and (spread[1] > spread[2]).all()


def test_a_larger_video_is_shifted_further_and_a_longer_one_is_not() -> None:
    settings = TimestepSettings(timestep_sampling="flux_shift")
    small, large, long = (
        draw(KEYS, shape, settings, seed=1, epoch=1).t for shape in ((1, 1, 8, 8), (1, 1, 90, 160), (1, 2, 8, 8))
    )
    assert (large > small).all()
    assert torch.equal(small, long)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_timestep": 500, "max_timestep": 500}, "--min_timestep 500 must be below --max_timestep 500"),
        ({"min_timestep": 900, "max_timestep": 100}, "--min_timestep 900"),
        ({"timestep_sampling": "shift", "weighting_scheme": "mode"}, "--weighting_scheme mode"),
        (
            {
                "timestep_sampling": "logsnr",
                "logit_mean": 9.0,
                "min_timestep": 900,
                "preserve_distribution_shape": True,
            },
            "almost never samples from 900 to 1000",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_timesteps(TimestepSettings(**options))


def test_what_can_be_drawn_is_not_refused() -> None:
    check_timesteps(TimestepSettings(timestep_sampling="shift", weighting_scheme="cosmap", max_timestep=1))
    thin = {"timestep_sampling": "logsnr", "logit_mean": 9.0, "min_timestep": 900}
    check_timesteps(TimestepSettings(**thin))
    check_timesteps(TimestepSettings(timestep_sampling="sigma", weighting_scheme="logit_normal"))


def test_thin_ranges_are_found_at_the_sizes_that_are_trained() -> None:
    settings = TimestepSettings(
        timestep_sampling="flux_shift", sigmoid_scale=0.2, max_timestep=450, preserve_distribution_shape=True
    )
    check_timesteps(settings, [(8, 8)])
    with pytest.raises(InputError, match="almost never samples"):
        check_timesteps(settings, [(8, 8), (160, 160)])


def test_the_default_draws_uniform_levels_with_their_keyed_generator() -> None:
    """What a seed means must not change from version to version."""
    values = draw([SampleKey("a/b", 1)], (1, 1, 1, 2), TimestepSettings(), seed=7, epoch=3)
    assert values.t.tolist() == [0.8098915815353394]
    assert values.noise.flatten().tolist() == pytest.approx([0.3461199, -0.0335202], abs=1e-6)


def test_every_key_seed_and_epoch_draws_anew() -> None:
    first = [drawn(KEYS), drawn(KEYS, seed=2), drawn(KEYS, epoch=2)]
    values = torch.stack([d.noise for d in first]).flatten(0, 1)
    assert len({tuple(v.flatten().tolist()) for v in values}) == 9
    assert len({float(t) for d in first for t in d.t}) == 9


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    drawn(KEYS)
    assert torch.equal(before, torch.get_rng_state())


class Oracle(nn.Module):
    """Knows the data, so that it can predict the velocity from x_t exactly."""

    def __init__(self, data: Tensor) -> None:
        super().__init__()
        self.data = data

    def forward(self, noisy: Tensor, timestep: Tensor, context: list[Tensor]) -> Tensor:
        t = (timestep / 1000).view(-1, 1, 1, 1, 1)
        return (noisy - self.data) / t


def test_the_true_velocity_has_no_loss_and_another_has_its_error() -> None:
    data, draws = torch.randn(3, *SHAPE), drawn(KEYS)
    conditions = Conditions((torch.zeros(1, 4),) * 3)
    assert mean_of(Oracle(data), data, conditions, draws) < 1e-9
    off = mean_of(Oracle(data + 0.5 * draws.t.view(-1, 1, 1, 1, 1)), data, conditions, draws)
    torch.testing.assert_close(off, torch.tensor(0.25))


def test_the_loss_of_half_precision_latents_is_taken_in_float32() -> None:
    data, draws = torch.randn(3, *SHAPE).bfloat16(), drawn(KEYS)
    loss = mean_of(Oracle(data.float()), data, Conditions((torch.zeros(1, 4),) * 3), draws)
    assert loss.dtype is torch.float32
    assert loss < 1e-9


def test_weights_say_what_counts() -> None:
    data, draws = torch.zeros(3, *SHAPE), drawn(KEYS)
    wrong = data.clone()
    wrong[..., 0] = 1.0  # a third of the columns
    conditions = Conditions((torch.zeros(1, 4),) * 3)
    model = Oracle(data + wrong * draws.t.view(-1, 1, 1, 1, 1))
    even = mean_of(model, data, conditions, draws)
    torch.testing.assert_close(even, torch.tensor(1 / 3))
    torch.testing.assert_close(mean_of(model, data, conditions, draws, weights=torch.ones(3, 1, 1, 3, 3)), even)
    weights = torch.zeros(3, 1, 1, 3, 3)
    weights[..., 0] = 3.0
    torch.testing.assert_close(mean_of(model, data, conditions, draws, weights=weights), torch.tensor(1.0))
    assert mean_of(model, data, conditions, draws, weights=1.5 - weights / 2) < 1e-12


def wrong_by(error: Tensor) -> tuple[Oracle, Tensor, Conditions, Draws]:
    """A model whose velocity is wrong by `error` (3, *SHAPE), and what it is measured on."""
    draws = drawn(KEYS)
    data = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(3))
    return Oracle(data - error * draws.t.view(-1, 1, 1, 1, 1)), data, Conditions((torch.zeros(1, 4),) * 3), draws


def test_the_loss_of_each_sample_has_the_mean_of_all() -> None:
    error = torch.arange(3.0).view(-1, 1, 1, 1, 1).expand(3, *SHAPE)
    arguments = wrong_by(error)
    torch.testing.assert_close(samples_of(*arguments), torch.tensor([0.0, 1.0, 4.0]))
    weights = torch.rand(3, 1, *SHAPE[1:])
    for options in ({}, {"weights": weights}, {"settings": LossSettings("huber", 0.5)}):
        losses = measure(*arguments, **options)
        torch.testing.assert_close(losses.samples.mean(), losses.mean)


def test_the_loss_is_to_the_bit_torchs_mean_squared_error() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.3))

        def forward(self, noisy: Tensor, timestep: Tensor, context: list[Tensor]) -> Tensor:
            return noisy * self.weight

    data, draws = torch.randn(3, *SHAPE), drawn(KEYS)
    ours, theirs = Linear(), Linear()
    loss = mean_of(ours, data, Conditions((torch.zeros(1, 4),) * 3), draws)
    t = draws.t.view(-1, 1, 1, 1, 1)
    expected = F.mse_loss(theirs((1 - t) * data + t * draws.noise, draws.t, []), draws.noise - data)
    assert torch.equal(loss, expected)
    (loss / 3).backward()
    (expected / 3).backward()
    assert ours.weight.grad is not None and theirs.weight.grad is not None
    assert torch.equal(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("c", [0.1, 2.0])
def test_huber_is_torchs_and_takes_masks(c: float) -> None:
    error = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(4))
    arguments, settings = wrong_by(error), LossSettings("huber", c)
    expected = F.huber_loss(error, torch.zeros_like(error), delta=c, reduction="none")
    torch.testing.assert_close(mean_of(*arguments, settings=settings), expected.mean(), rtol=1e-4, atol=1e-5)
    weights = torch.rand(3, 1, *SHAPE[1:])
    masked = mean_of(*arguments, settings=settings, weights=weights)
    torch.testing.assert_close(masked, (expected * weights).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampling", ["sigma", "shift"])
def test_weighting_by_level_goes_with_every_sampling_and_with_masks(sampling: str, recwarn: Any) -> None:
    """Regression: levels beside the table of 1000 were looked up in it in vain, with a warning at each step."""
    settings = TimestepSettings(timestep_sampling=sampling, weighting_scheme="sigma_sqrt")
    draws = draw(KEYS, SHAPE, settings, seed=1, epoch=1)
    assert draws.importance is not None
    torch.testing.assert_close(draws.importance, draws.t**-2)
    data, conditions = torch.zeros(3, *SHAPE), Conditions((torch.zeros(1, 4),) * 3)
    model = Oracle(data + draws.t.view(-1, 1, 1, 1, 1))  # wrong by 1 everywhere
    torch.testing.assert_close(samples_of(model, data, conditions, draws), draws.t**-2)
    weights = torch.rand(3, 1, *SHAPE[1:])
    masked = mean_of(model, data, conditions, draws, weights=weights)
    torch.testing.assert_close(masked, (draws.t**-2 * weights.mean((1, 2, 3, 4))).mean())
    assert not recwarn.list


def test_a_loss_has_a_gradient_and_those_of_its_samples_have_none() -> None:
    model, data, conditions, draws = wrong_by(torch.ones(3, *SHAPE))
    model.data.requires_grad_()
    for weights in (None, torch.ones(3, 1, *SHAPE[1:])):
        losses = measure(model, data.detach(), conditions, draws, weights=weights)
        assert losses.mean.requires_grad and not losses.samples.requires_grad


def test_draws_move_whole() -> None:
    settings = TimestepSettings(weighting_scheme="cosmap")
    moved = draw(KEYS, SHAPE, settings, seed=1, epoch=1).to(torch.device("meta"))
    assert moved.importance is not None
    assert {part.device.type for part in (moved.t, moved.noise, moved.importance)} == {"meta"}
