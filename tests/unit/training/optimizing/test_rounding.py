"""Weights in bfloat16 that are stochastically rounded."""

from typing import Any

import pytest
import torch

from wan_train.errors import InputError
from wan_train.training.optimizing.optimizer_state import load_portable_state, portable_state
from wan_train.training.optimizing.optimizers import check_optimizer, make_optimizer
from wan_train.training.optimizing.rounding import round_stochastically, rounded
from wan_train.training.settings import OptimizerSettings

ONES = {"AdamW": (), "SGD": ("momentum=0.9",), "Adafactor": (), "CAME": (), "AdamW8bitSR": ()}


def settings_of(name: str, rate: float, *arguments: str) -> OptimizerSettings:
    return OptimizerSettings(optimizer_type=name, learning_rate=rate, optimizer_args=arguments)


def turns_of(seed: int | None) -> Any:
    return None if seed is None else (rounded(seed),)


def train(name: str, weight: torch.nn.Parameter, steps: int, *, rate: float, seed: int | None = 1) -> Any:
    """Steps down a slope that varies a little."""
    optimizer = make_optimizer(
        [{"params": [weight], "lr": rate}], settings_of(name, rate, *ONES[name]), step_contexts=turns_of(seed)
    )
    go_on(optimizer, weight, range(steps))
    return optimizer


def go_on(optimizer: Any, weight: torch.nn.Parameter, steps: range) -> None:
    for step in steps:
        slope = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)) * 0.1 + 1
        weight.grad = slope.to(weight.dtype)
        optimizer.step()


def test_the_mean_is_exact_and_only_neighbours_come() -> None:
    x = torch.tensor([1.0019531, -1.0019531, 3e-39, 1.0]).repeat(100_000, 1)
    rounded = round_stochastically(x, torch.Generator().manual_seed(0)).float()
    torch.testing.assert_close(rounded.mean(0), x[0], rtol=1e-4, atol=1e-41)
    assert set(rounded[:, 0].tolist()) == {1.0, 1.0078125}
    assert set(rounded[:, 3].tolist()) == {1.0}
    odd = torch.tensor([float("inf"), float("-inf"), float("nan")])
    torch.testing.assert_close(round_stochastically(odd, torch.Generator()).float(), odd, equal_nan=True)


@pytest.mark.parametrize("name", ONES)
def test_a_thousand_steps_too_small_for_bfloat16_count_in_the_mean(name: str) -> None:
    rate = 1e-5 if name != "SGD" else 1e-6
    fine = torch.nn.Parameter(torch.ones(64, 64))
    coarse = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    plain = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    train(name, fine, 1000, rate=rate, seed=None)
    train(name, coarse, 1000, rate=rate)
    if name != "CAME":  # which keeps bfloat16 states of bfloat16 weights
        train(name, plain, 1000, rate=rate, seed=None)
        assert torch.equal(plain, torch.ones_like(plain))
    moved, wanted = (float((weight.detach().float() - 1).mean()) for weight in (coarse, fine))
    assert coarse.dtype == torch.bfloat16
    assert moved == pytest.approx(wanted, rel=0.02)


def test_float32_weights_step_as_ever() -> None:
    ours, theirs = (torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2))
    train("AdamW", ours, 5, rate=1e-2)
    train("AdamW", theirs, 5, rate=1e-2, seed=None)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ONES)
def test_it_goes_on_to_the_bit_and_another_seed_rounds_otherwise(name: str) -> None:
    whole, parts, other = (torch.nn.Parameter(torch.ones(32, 32, dtype=torch.bfloat16)) for _ in range(3))
    train(name, whole, 10, rate=1e-3)
    state = portable_state(train(name, parts, 4, rate=1e-3))
    again = torch.nn.Parameter(parts.detach().clone())
    optimizer = make_optimizer(
        [{"params": [again], "lr": 1e-3}], settings_of(name, 1e-3, *ONES[name]), step_contexts=turns_of(1)
    )
    load_portable_state(optimizer, state)
    go_on(optimizer, again, range(4, 10))
    assert torch.equal(again, whole)
    train(name, other, 10, rate=1e-3, seed=2)
    assert not torch.equal(other, whole)


@pytest.mark.parametrize("name", ["Prodigy", "AdamWScheduleFree", "AdamW8bit", "RMSprop"])
def test_what_cannot_round_so_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="--full_bf16 needs stochastic rounding"):
        check_optimizer(settings_of(name, 1e-3), rounded=True)
