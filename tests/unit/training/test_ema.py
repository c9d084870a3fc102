"""Averages of what is trained: where they are kept, and parameters that hold them for a while."""

import pytest
import torch
from torch import Tensor, nn

from wan_train.training.ema import Ema


def weights(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(5, 7).to(dtype)) for name in ("a", "b")}


def moved(parameters: dict[str, nn.Parameter], ema: Ema, steps: int = 4) -> Ema:
    for step in range(steps):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.01 * (step + 1))
        ema.update()
    return ema


def averages(ema: Ema) -> dict[str, Tensor]:
    found = ema.state_dict()["averages"]
    assert isinstance(found, dict)
    return {name: average.clone() for name, average in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_main_memory_it_is_the_same_average(dtype: torch.dtype) -> None:
    near, far = weights(dtype), weights(dtype)
    one, two = moved(near, Ema(near, 0.9)), moved(far, Ema(far, 0.9, in_main_memory=True))
    assert all(torch.equal(value, averages(two)[name]) for name, value in averages(one).items())
    assert all(value.dtype == torch.float32 for value in averages(two).values())
    two.load_state_dict(one.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_while_it_is_applied_parameters_hold_it_in_their_own_memory(dtype: torch.dtype) -> None:
    parameters = weights(dtype)
    ema = moved(parameters, Ema(parameters, 0.9, in_main_memory=True))
    homes = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    kept, forgotten = averages(ema), []
    with pytest.raises(ValueError, match="a preview failed"), ema.applied(lambda: forgotten.append(1)):
        for name, parameter in parameters.items():
            assert torch.equal(parameter, kept[name].to(dtype)) and not torch.equal(parameter, before[name])
            assert parameter.data_ptr() == homes[name]
        raise ValueError("a preview failed")
    assert len(forgotten) == 2
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())
    assert all(torch.equal(value, kept[name]) for name, value in averages(ema).items())


def test_it_stands_in_as_fine_as_it_is_kept() -> None:
    parameters = weights(torch.bfloat16)
    ema = moved(parameters, Ema(parameters, 0.9))
    before = {name: parameter.data for name, parameter in parameters.items()}
    with ema.standing_in():
        assert all(torch.equal(parameter.data, averages(ema)[name]) for name, parameter in parameters.items())
    assert all(parameter.data is not None and torch.equal(parameter, before[n]) for n, parameter in parameters.items())
    assert all(parameter.dtype == torch.bfloat16 for parameter in parameters.values())
