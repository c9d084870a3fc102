from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from wan_train.training.loop import is_due, make_previews, run_length, windows
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
