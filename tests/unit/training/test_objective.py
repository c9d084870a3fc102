import torch
from torch import Tensor, nn

from dataset.order import SampleKey
from wan_train.conditions import Conditions
from wan_train.training.objective import Draws, draw, flow_loss
from wan_train.training.settings import TimestepSettings

SHAPE = (2, 1, 3, 3)
KEYS = [SampleKey("a", 0), SampleKey("b", 0), SampleKey("b", 1)]


def drawn(keys: list[SampleKey], *, seed: int = 1, epoch: int = 1) -> Draws:
    return draw(keys, SHAPE, TimestepSettings(timestep_sampling="shift"), seed=seed, epoch=epoch)


def test_noise_and_t_belong_to_the_sample_not_to_its_batch() -> None:
    together = drawn(KEYS)
    for index, key in enumerate(KEYS):
        alone = drawn([key])
        assert torch.equal(alone.noise[0], together.noise[index])
        assert torch.equal(alone.t[0], together.t[index])


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
    assert flow_loss(Oracle(data), data, conditions, draws) < 1e-9
    off = flow_loss(Oracle(data + 0.5 * draws.t.view(-1, 1, 1, 1, 1)), data, conditions, draws)
    torch.testing.assert_close(off, torch.tensor(0.25))


def test_the_loss_of_half_precision_latents_is_taken_in_float32() -> None:
    data, draws = torch.randn(3, *SHAPE).bfloat16(), drawn(KEYS)
    loss = flow_loss(Oracle(data.float()), data, Conditions((torch.zeros(1, 4),) * 3), draws)
    assert loss.dtype is torch.float32
    assert loss < 1e-9


def test_weights_say_what_counts() -> None:
    data, draws = torch.zeros(3, *SHAPE), drawn(KEYS)
    wrong = data.clone()
    wrong[..., 0] = 1.0  # a third of the columns
    conditions = Conditions((torch.zeros(1, 4),) * 3)
    model = Oracle(data + wrong * draws.t.view(-1, 1, 1, 1, 1))
    even = flow_loss(model, data, conditions, draws)
    torch.testing.assert_close(even, torch.tensor(1 / 3))
    torch.testing.assert_close(flow_loss(model, data, conditions, draws, weights=torch.ones(3, 1, 1, 3, 3)), even)
    weights = torch.zeros(3, 1, 1, 3, 3)
    weights[..., 0] = 3.0
    torch.testing.assert_close(flow_loss(model, data, conditions, draws, weights=weights), torch.tensor(1.0))
    assert flow_loss(model, data, conditions, draws, weights=1.5 - weights / 2) < 1e-12
