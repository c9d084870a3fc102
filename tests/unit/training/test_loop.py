from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from wan_train.training.loop import Reports, is_due, make_previews, run_length, windows
from wan_train.training.optimizing.ema import Ema
from wan_train.training.reporting.settings import PreviewSettings
from wan_train.training.run import Reporting
from wan_train.training.settings import LoopSettings


@pytest.mark.parametrize(
    ("loop", "steps", "epochs"),
    [
        ({"max_train_epochs": 3}, 30, 3),
        ({"max_train_epochs": 3, "gradient_accumulation_steps": 4}, 9, 3),
        ({"max_train_steps": 25}, 25, 3),
        ({"max_train_steps": 6, "gradient_accumulation_steps": 4}, 6, 2),
        ({"max_train_steps": 5, "max_train_epochs": 1}, 10, 1),
    ],
)
def test_how_long_a_run_of_ten_batches_an_epoch_is(loop: dict[str, Any], steps: int, epochs: int) -> None:
    length = run_length(10, LoopSettings(**loop))
    assert (length.steps, length.epochs) == (steps, epochs)


def test_windows_end_with_the_epoch() -> None:
    assert [len(window) for window in windows(range(10), 4)] == [4, 4, 2]  # type: ignore[arg-type]


def test_what_happens_every_so_often() -> None:
    assert [count for count in range(1, 10) if is_due(count, 3)] == [3, 6, 9]
    assert not is_due(5, None)


@pytest.mark.parametrize(("with_ema", "shown"), [(True, 0.5), (False, 1.0)])
def test_previews_show_the_average_if_that_is_asked_for(with_ema: bool, shown: float) -> None:
    weight, seen = nn.Parameter(torch.zeros(1)), []
    ema = Ema({"w": weight}, 0.0)
    weight.data.fill_(0.5)
    ema.update()  # with a decay of 0 it is the weight of its last update
    weight.data.fill_(1.0)
    optimizing: Any = SimpleNamespace(
        optimizer=torch.optim.SGD([weight]), ema=ema, stepping=SimpleNamespace(forget=lambda: None)
    )
    previewer: Any = SimpleNamespace(make=lambda *_: seen.append(float(weight.detach())) or {})
    model: Any = SimpleNamespace(dit=None)
    reporting = Reporting(PreviewSettings(sample_with_ema=with_ema), previewer, None)
    make_previews(reporting, model, optimizing, moment="000001", step=1)
    assert seen == [shown] and float(weight.detach()) == 1.0


class Launched:
    """A deferred step with the signal that its processes agreed on."""

    def __init__(self, step: int, signal: int = 0, *, is_deferred: bool = True) -> None:
        self.step, self.signal, self.is_deferred = step, signal, is_deferred

    def conclude(self) -> tuple[Any, int]:
        return SimpleNamespace(step=self.step, loss_average=0.0, lr=0.0, memory_mib=0), self.signal


def test_a_signal_is_known_with_the_values_of_its_step() -> None:
    """Processes agree on it by these values, so that all of them stop after the same step."""
    written: list[int] = []
    bar: Any = SimpleNamespace(set_postfix=lambda *_, **__: None, update=lambda _: None)
    writer: Any = SimpleNamespace(write=lambda metrics: written.append(metrics.step))
    with Reports(writer, bar) as reports:
        assert reports.add(Launched(1, 15), at_once=False) == 0  # type: ignore[arg-type]
        assert written == []
        assert reports.add(Launched(2), at_once=False) == 15  # type: ignore[arg-type]
        assert written == [1]
        assert reports.add(Launched(3, 2), at_once=True) == 2  # type: ignore[arg-type]
        assert reports.add(Launched(4, is_deferred=False), at_once=False) == 0  # type: ignore[arg-type]
        assert written == [1, 2, 3, 4]
        reports.add(Launched(5), at_once=False)  # type: ignore[arg-type]
    assert written == [1, 2, 3, 4, 5]
