"""Devices that have no float64, as Apple's: the meta device plays one, its copies to the CPU are zeros."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.unit.models.dit.test_dit import CONFIG
from wan_train import precision
from wan_train.models.dit.dit import Dit
from wan_train.models.dit.embedding import sinusoid
from wan_train.precision import float64_device
from wan_train.training.outcome import Measures, gather_rows

META, CPU = torch.device("meta"), torch.device("cpu")


class WithoutFloat64(TorchDispatchMode):
    """While entered, the meta device refuses float64, and what is copied from it is zeros."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == CPU:
            result = torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        else:
            result = func(*args, **kwargs)
        for leaf in tree_leaves([args, kwargs, result]):
            if isinstance(leaf, Tensor) and leaf.is_meta and leaf.dtype == torch.float64:
                raise TypeError(f"{func}: this device has no float64")
        return result


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> WithoutFloat64:
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", (*precision.WITHOUT_FLOAT64, "meta"))
    return WithoutFloat64()


def test_the_stand_in_refuses_float64(apple: WithoutFloat64) -> None:
    with apple, pytest.raises(TypeError, match="has no float64"):
        torch.zeros(2, device=META).double()


def test_where_float64_is_done() -> None:
    places = {name: str(float64_device(torch.device(name))) for name in ("mps", "cpu", "cuda:1", "meta")}
    assert places == {"mps": "cpu", "cpu": "cpu", "cuda:1": "cuda:1", "meta": "meta"}


def test_the_model_trains_without_float64(apple: WithoutFloat64) -> None:
    with apple:
        model = Dit(CONFIG).to(META)
        latents, text = torch.zeros(2, 16, 3, 4, 6, device=META), torch.zeros(2, 512, 20, device=META)
        for timestep in (torch.zeros(2, device=META), torch.zeros(2, 3, device=META)):
            velocity = model(latents, timestep, text, frame_positions=torch.tensor([0.0, 2.0, 5.0]))
            velocity.square().mean().backward()
        assert velocity.is_meta and model.blocks[0].modulation.grad is not None


def test_the_embedding_of_time_comes_back_to_its_device(apple: WithoutFloat64) -> None:
    with apple:
        embedded = sinusoid(torch.zeros(2, 3, device=META), 8)
    assert embedded.is_meta and embedded.dtype == torch.float32 and embedded.shape == (2, 3, 8)


def test_what_processes_exchange_after_a_step(apple: WithoutFloat64) -> None:
    gathered: list[Tensor] = []
    accelerator: Any = SimpleNamespace(gather=lambda rows: gathered.append(rows) or rows)
    with apple:
        loss, losses, norm = torch.zeros((), device=META), torch.zeros(2, device=META), torch.zeros((), device=META)
        values = Measures(gather_rows(accelerator, loss, 15), losses, norm).read().values()
    assert gathered[0].is_meta and gathered[0].shape == (1, 2)
    assert (values.loss, values.norm, values.samples.tolist()) == (0, 0, [0, 0])


def test_the_shared_loss_is_the_mean_and_the_signal_the_last() -> None:
    other = torch.tensor([[0.3, 15.0]])
    accelerator: Any = SimpleNamespace(gather=lambda rows: torch.cat([rows, other]))
    rows = gather_rows(accelerator, torch.tensor(0.1), 0)
    for norm in (torch.tensor(0.5), 0.5):
        values = Measures(rows, torch.tensor([0.2, 0.4]), norm).read().values()
        assert values.loss == float((torch.tensor(0.1).double() + torch.tensor(0.3).double()) / 2)
        assert (values.signal, values.norm) == (15, 0.5)
        assert torch.equal(values.samples, torch.tensor([0.2, 0.4]))
