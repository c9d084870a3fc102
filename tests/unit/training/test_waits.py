"""A step waits for the device once at most, and not for its own values if the optimizer can skip a step by itself."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dataset.batching.batches import Batch
from dataset.batching.order import SampleKey
from networks.adapter import Adapter, create
from networks.settings import NetworkSettings
from tests.unit.models.dit.test_dit import CONFIG
from tests.waits import META, READ, counting_waits
from wan_train.models.dit.dit import Dit
from wan_train.models.variants import VARIANTS
from wan_train.training import step
from wan_train.training.carried import RunningMean, Skipped
from wan_train.training.experts.models import TrainedModel
from wan_train.training.experts.plan import ExpertPlan
from wan_train.training.objective.objective import Objective
from wan_train.training.optimizing.optimization import Optimization
from wan_train.training.optimizing.stepping import Stepping
from wan_train.training.outcome import Launched
from wan_train.training.saving.state import Position
from wan_train.training.settings import LossSettings, TimestepSettings
from wan_train.training.step import NORM_EVERY, take_step, with_draws
from wan_train.training.stopping import StopRequest


class Steps:
    """Steps of a small LoRA run on the meta device."""

    def __init__(self, *, fused: bool) -> None:
        dit = Dit(CONFIG)
        self.adapter: Adapter = create(dit, NetworkSettings(network_dim=4), seed=0)
        dit.to(META)
        accelerator: Any = SimpleNamespace(
            device=META,
            scaler=None,
            num_processes=1,
            gather=lambda rows: rows,
            no_sync=lambda _: nullcontext(),
            backward=Tensor.backward,
            clip_grad_norm_=nn.utils.clip_grad_norm_,
        )
        self.model = TrainedModel(accelerator, dit, dit, self.adapter, ExpertPlan())
        weights = list(self.model.trained.values())
        optimizer = torch.optim.AdamW(weights, fused=fused) if fused else torch.optim.SGD(weights)
        self.optimizing = Optimization(
            optimizer=optimizer,
            stepping=Stepping(optimizer, None, lambda: None, lambda: None),
            schedule=SimpleNamespace(step=lambda: None),
            ema=None,
            average=RunningMean(),
            skipped=Skipped(),
            max_grad_norm=1.0,
            skip_nonfinite=0,
            scale_weight_norms=None,
        )
        self.objective = Objective(0, TimestepSettings(), LossSettings(), VARIANTS["t2v-1.3B"])
        self.stop = StopRequest()

    def take(self, number: int) -> Launched:
        keys = (SampleKey("a", 0), SampleKey("b", 0))
        batch = Batch(keys, torch.randn(2, 16, 3, 4, 6), [torch.randn(7, 20), torch.randn(3, 20)])
        position = Position(number, 1, number)
        drawn = with_draws(
            [batch] * 2,
            position,
            objective=self.objective,
            experts=self.model.experts,
            batches_per_step=2,
            device=META,
        )
        return take_step(
            list(drawn),
            position,
            model=self.model,
            optimizing=self.optimizing,
            objective=self.objective,
            stop=self.stop,
        )


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's fused optimizers take tensors of the meta device."""
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None)


def test_a_step_that_the_optimizer_can_skip_waits_for_the_step_before_alone(
    anywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(fused=True)
    with counting_waits(monkeypatch) as waits:
        before = steps.take(1)
        assert before.is_deferred and not waits.found
        for number in range(2, 5):
            launched = steps.take(number)
            assert not waits.found, "the step itself waits"
            metrics, signal = before.conclude()
            assert (metrics.step, metrics.loss, metrics.grad_norm, signal) == (number - 1, 1.0, 1.0, 1)
            assert waits.found == {"event": 1}
            waits.found.clear()
            before = launched


def test_other_steps_wait_once(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(fused=False)
    with counting_waits(monkeypatch) as waits:
        for number in range(1, 4):
            launched = steps.take(number)
            metrics, _ = launched.conclude()
            assert not launched.is_deferred and metrics.loss == 1.0
            assert waits.found == {"event": 1}
            waits.found.clear()


@pytest.mark.parametrize("fused", [True, False])
def test_the_norm_of_the_adapter_is_measured_now_and_then(
    fused: bool, anywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(fused=fused)
    with counting_waits(monkeypatch) as waits:
        metrics, _ = steps.take(NORM_EVERY).conclude()
    assert metrics.adapter_norm == 1.0
    assert waits.found[READ] == 1 and waits.found.total() <= 3


def test_a_wait_within_a_step_is_found(anywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(*arguments: Any, **named: Any) -> Any:
        found = measure(*arguments, **named)
        return found if float(found.mean.detach()) < 9 else None

    measure, steps = step.measure, Steps(fused=True)
    monkeypatch.setattr(step, "measure", careless)
    with counting_waits(monkeypatch) as waits:
        steps.take(1)
    assert waits.found == {READ: 2}, "one for each batch"
