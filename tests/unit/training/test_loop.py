from typing import Any

import pytest

from wan_train.training.loop import is_due, run_length, windows
from wan_train.training.settings import LoopSettings


class Settings:
    def __init__(self, **loop: Any) -> None:
        self.loop = LoopSettings(**loop)


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
def test_how_long_a_run_of_ten_batches_an_epoch_is(loop: dict[str, int], steps: int, epochs: int) -> None:
    length = run_length(10, Settings(**loop))  # type: ignore[arg-type]
    assert (length.steps, length.epochs) == (steps, epochs)


def test_windows_end_with_the_epoch() -> None:
    assert [len(window) for window in windows(range(10), 4)] == [4, 4, 2]  # type: ignore[arg-type]


def test_what_happens_every_so_often() -> None:
    assert [count for count in range(1, 10) if is_due(count, 3)] == [3, 6, 9]
    assert not is_due(5, None)
