"""Steps inside of the backward pass: as those after it, each part clipped by itself, one part's gradients at a time."""

import gc
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_train.training.optimizing.fused import FusedBackward
from wan_train.training.optimizing.one_by_one import Part
from wan_train.training.optimizing.optimizer_state import load_portable_state, portable_state
from wan_train.training.optimizing.optimizers import make_optimizer
from wan_train.training.optimizing.rounding import rounded
from wan_train.training.optimizing.stepping import parts_of
from wan_train.training.settings import OptimizerSettings


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.unused = (nn.Linear(8, 8) for _ in range(3))
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        shift = x = self.first(x)
        for block in self.blocks:
            x = torch.tanh(block(x)) + shift
        return self.head(x).square().mean()


def made(model: Model, name: str, *, rate: float, limit: float | None) -> tuple[torch.optim.Optimizer, FusedBackward]:
    """An optimizer with the model's parts, and steps inside of the backward pass unless `limit` is None."""
    settings = OptimizerSettings(optimizer_type=name, learning_rate=rate)
    optimizer = make_optimizer(
        [{"params": list(model.parameters()), "lr": rate}], settings, step_contexts=(rounded(3),)
    )
    optimizer.parts = parts_of(dict(model.named_parameters()), {})
    return optimizer, FusedBackward(optimizer, optimizer.parts if limit is not None else (), limit=limit or 0)


def train(model: Model, name: str, *, steps: int = 5, rate: float = 1e-2, limit: float | None = None) -> list[float]:
    optimizer, fused = made(model, name, rate=rate, limit=limit)
    norms = []
    for step in range(steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(model.head.weight.dtype)
        model(x).backward()
        norms.append(fused.finish())
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "SGD", "AdamW8bitSR"])
def test_it_equals_the_ordinary_step_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    ordinary, fused = Model(dtype), Model(dtype)
    train(ordinary, name)
    train(fused, name, limit=math.inf)
    for (key, wanted), found in zip(ordinary.named_parameters(), fused.parameters(), strict=True):
        assert torch.equal(found, wanted), key
    assert not torch.equal(fused.head.weight, Model(dtype).head.weight)
    assert torch.equal(fused.unused.weight, Model(dtype).unused.weight)


def test_parts_are_blocks_and_first_names_of_each_expert() -> None:
    names = ["blocks.0.a", "blocks.10.a", "blocks.0.b", "head.x", "head.modulation", "high_noise.blocks.0.a"]
    parts = parts_of({name: nn.Parameter(torch.zeros(1)) for name in names}, {})
    assert {part.name: len(part.parameters) for part in parts} == {
        "blocks.0": 2,
        "blocks.10": 1,
        "head": 2,
        "high_noise.blocks.0": 1,
    }


def test_each_part_is_clipped_by_its_own_norm() -> None:
    model, free = Model(), Model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (norm,) = train(model, "SGD", steps=1, rate=1.0, limit=1e-3)
    (_,) = train(free, "SGD", steps=1, rate=1.0)
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    whole = {name: p.detach() - before[name] for name, p in free.named_parameters()}
    assert norm == pytest.approx(math.hypot(*(float(change.norm()) for change in whole.values())), rel=1e-4)
    for part in ("first", "blocks.0", "blocks.1", "blocks.2", "head"):
        length = math.hypot(*(float(change.norm()) for name, change in moved.items() if name.startswith(part)))
        assert length == pytest.approx(1e-3, rel=1e-2)


def test_gradients_of_one_part_are_alive_at_a_time() -> None:
    model = Model()
    alive: list[set[str]] = []

    @contextmanager
    def looking() -> Iterator[None]:
        alive.append({name.rpartition(".")[0] for name, p in model.named_parameters() if p.grad is not None})
        yield

    optimizer, _ = made(model, "SGD", rate=1e-2, limit=None)
    parts = [Part(part.name, part.parameters, looking) for part in optimizer.parts]
    fused = FusedBackward(optimizer, parts, limit=math.inf)
    model(torch.ones(4, 8)).backward()
    fused.finish()
    # `first` is used last of all on the way back: nothing of it is there before.
    assert alive == [{"head"}, {"blocks.2"}, {"blocks.1"}, {"blocks.0"}, {"first"}]


def test_a_part_whose_gradient_is_no_number_is_left_out() -> None:
    model, before = Model(), Model()
    model.blocks[1].weight.register_hook(lambda gradient: gradient * math.nan)
    (norm,) = train(model, "AdamW", steps=1, limit=1.0)
    assert math.isnan(norm)
    assert torch.equal(model.blocks[1].bias, before.blocks[1].bias)
    assert not torch.equal(model.blocks[0].bias, before.blocks[0].bias)


def test_a_part_that_got_some_of_its_gradients_is_stepped_at_the_end() -> None:
    model, before = Model(), Model()
    _, fused = made(model, "AdamW", rate=1e-2, limit=math.inf)
    F.linear(model.first(torch.ones(4, 8)), model.head.weight).square().mean().backward()
    assert torch.equal(model.head.weight, before.head.weight)
    assert not torch.equal(model.first.weight, before.first.weight)
    fused.finish()
    assert not torch.equal(model.head.weight, before.head.weight)
    assert torch.equal(model.head.bias, before.head.bias)


def test_gradients_are_exchanged_before_they_are_clipped() -> None:
    model, other = Model(), Model()
    optimizer, _ = made(model, "SGD", rate=1.0, limit=None)
    fused = FusedBackward(optimizer, optimizer.parts, limit=math.inf, reduce=partial(torch.mul, other=0.5))
    model(torch.ones(4, 8)).backward()
    fused.finish()
    halved = model.head.bias - Model().head.bias
    train_once, plain = made(other, "SGD", rate=1.0, limit=math.inf)
    other(torch.ones(4, 8)).backward()
    plain.finish()
    train_once.step()
    torch.testing.assert_close(halved * 2, other.head.bias - Model().head.bias)


def test_loaded_states_go_where_steps_are_taken_and_counts_stay() -> None:
    model = Model()
    optimizer, _ = made(model, "AdamW", rate=1e-2, limit=None)
    model(torch.ones(4, 8)).backward()
    optimizer.step()
    saved = portable_state(optimizer)
    for home, device in ((None, "cpu"), (torch.device("meta"), "meta")):
        again, _ = made(model, "AdamW", rate=1e-2, limit=None)
        again.home = home
        load_portable_state(again, saved)
        state = again.state[model.head.weight]
        assert (state["exp_avg"].device.type, state["step"].device.type) == (device, "cpu")
        assert again.param_groups[0]["rounded_steps"] == 1


def test_weights_are_gone_with_their_run() -> None:
    """Nothing that the hooks hold keeps them until the garbage collector comes, if it ever finds them."""
    gc.collect()
    gc.disable()
    try:
        model = Model()
        optimizer, fused = made(model, "AdamW", rate=1e-2, limit=1.0)
        for _ in range(2):
            model(torch.ones(4, 8)).backward()
            fused.finish()
            optimizer.step()
        gone = weakref.ref(model.head.weight)
        storage = weakref.ref(model.head.weight.untyped_storage())
        del model, optimizer, fused
        assert gone() is None and storage() is None
    finally:
        gc.enable()
