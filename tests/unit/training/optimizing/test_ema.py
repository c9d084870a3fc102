"""Averages of what is trained: where they are kept, and parameters that hold them for a while."""

import pytest
import torch
from torch import Tensor, nn

from tests.unit.placement.counting import Meter
from tests.unit.placement.test_states import Lane
from wan_train.models.dit.experts import pair_of
from wan_train.placement.lanes import HostLane, make_lane
from wan_train.training.experts.pair import PairEma
from wan_train.training.optimizing.ema import Ema, reading

CPU = torch.device("cpu")


def weights(dtype: torch.dtype, names: str = "ab") -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(5, 7).to(dtype)) for name in names}


class Waiting(Lane):
    """Copies as late as they may be, and counts how often Python waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def finish(self) -> None:
        self.waits += 1
        super().finish()


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
    one, two = moved(near, Ema(near, 0.9)), moved(far, Ema(far, 0.9, lane=HostLane(CPU)))
    assert all(torch.equal(value, averages(two)[name]) for name, value in averages(one).items())
    assert all(value.dtype == torch.float32 for value in averages(two).values())
    resumed = Ema(weights(dtype), 0.9, lane=HostLane(CPU))
    resumed.load_state_dict(one.state_dict())
    assert all(torch.equal(value, averages(resumed)[name]) for name, value in averages(one).items())


def test_the_average_is_that_of_the_formula() -> None:
    """average += (1 - decay) (parameter - average), the decay at most (1 + steps) / (10 + steps)."""
    parameter = nn.Parameter(torch.zeros(2))
    ema, expected = Ema({"a": parameter}, 0.3), 0.0
    for step, decay in enumerate((2 / 11, 3 / 12, 0.3, 0.3), 1):
        with torch.no_grad():
            parameter.fill_(float(step))
        ema.update()
        expected += (1 - decay) * (step - expected)
        torch.testing.assert_close(averages(ema)["a"], torch.full((2,), expected))


@pytest.mark.parametrize("names", ["a", "abc", "abcdefghijklmnop"])
def test_however_many_tensors_there_are_an_update_waits_for_no_copy(names: str) -> None:
    """And nothing of them stays on the device, however late copies are made; whoever reads them waits once."""
    lane, near, far = Waiting(), weights(torch.bfloat16, names), weights(torch.bfloat16, names)
    ema = Ema(far, 0.9, lane=lane)
    lane.waits, made = 0, len(lane.hosts)
    with Meter() as meter:
        moved(far, ema)
    assert lane.waits == 0 and len(lane.hosts) == made == len(names)
    assert meter.live() == lane.far()  # which the meter sees too
    wanted = averages(moved(near, Ema(near, 0.9)))
    assert all(torch.equal(value, wanted[name]) for name, value in averages(ema).items())
    assert lane.waits == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_pinned_memory_it_is_the_average_on_the_device(dtype: torch.dtype) -> None:
    near, far = ({name: nn.Parameter(p.detach().cuda()) for name, p in weights(dtype).items()} for _ in range(2))
    one, two = moved(near, Ema(near, 0.9)), moved(far, Ema(far, 0.9, lane=make_lane(torch.device("cuda"))))
    for name, average in averages(two).items():
        assert average.device.type == "cpu" and torch.equal(average, averages(one)[name].cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_while_it_is_applied_parameters_hold_it_in_their_own_memory(dtype: torch.dtype) -> None:
    parameters = weights(dtype)
    ema = moved(parameters, Ema(parameters, 0.9, lane=HostLane(CPU)))
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


def test_an_exception_on_the_way_in_leaves_the_weights_as_they_were() -> None:
    parameters = weights(torch.bfloat16)
    ema = moved(parameters, Ema(parameters, 0.9))
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    ema.state_dict()["averages"]["b"].resize_(0)  # type: ignore[index]
    with pytest.raises(RuntimeError), ema.applied(lambda: None):
        pass
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())


def test_it_is_read_as_fine_as_it_is_kept() -> None:
    parameters, other = weights(torch.bfloat16), nn.Parameter(torch.ones(2))
    ema = moved(parameters, Ema(parameters, 0.9))
    read = reading(ema.averages)
    for name, parameter in parameters.items():
        assert read(parameter).dtype == torch.float32 and torch.equal(read(parameter), averages(ema)[name])
        assert parameter.dtype == torch.bfloat16
    assert torch.equal(read(other), other)


def test_of_two_experts_both_are_read() -> None:
    high, low = weights(torch.float32), weights(torch.float32)
    ema = PairEma(pair_of({"high_noise": Ema(high, 0.9), "low_noise": Ema(low, 0.9)}))
    before = {parameter: parameter.detach().clone() for parameter in (*high.values(), *low.values())}
    for parameter in before:
        parameter.data = parameter.data + 1
    ema.update("low_noise")
    read = reading(ema.averages)
    assert all(torch.equal(read(parameter), before[parameter]) for parameter in high.values())
    assert all(not torch.equal(read(parameter), before[parameter]) for parameter in low.values())
