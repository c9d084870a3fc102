"""Models that are kept between videos: a DiT is copied to CPU RAM once and only ever comes back from there."""

import pytest
import torch
from torch import Tensor

from generate.models import Models
from generate.settings import GenerateSettings
from tests.unit.placement.recording import Toy
from tests.unit.placement.test_states import Lane
from wan_train.config_file import from_values

CPU = torch.device("cpu")


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> Lane:
    """The lane to a device that is not the CPU."""
    made = Lane()
    monkeypatch.setattr("generate.models.lane_from_host", lambda device: made)
    return made


def frozen() -> Toy:
    return Toy(2).requires_grad_(False)


def answer(models: Models, expert: str | None) -> Tensor:
    with models.dit(expert) as loaded, torch.no_grad():
        found: Tensor = loaded.model(torch.ones(1, 2, 8))
        return found


@pytest.mark.parametrize("keep", [True, False])
def test_a_dit_that_is_kept_has_one_copy_in_pinned_memory(
    keep: bool, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = Models(from_values(GenerateSettings, {"task": "t2v-1.3B", "dit": "x"}, "here"), {}, CPU, keep=keep)
    opened: list[str | None] = []
    monkeypatch.setattr(Models, "_open_dit", lambda self, expert: opened.append(expert) or frozen())
    wanted, each = frozen()(torch.ones(1, 2, 8)), len(list(frozen().parameters()))
    for turn in range(3):
        for expert in ("high_noise", "low_noise"):
            lane.events.clear()
            assert torch.equal(answer(models, expert), wanted)
            assert lane.events == ([["out"], ["back"]][turn > 0] * each if keep else [])
    assert len(opened) == (2 if keep else 6) and len(lane.hosts) == (2 * each if keep else 0)


def test_a_dit_that_did_not_come_back_is_loaded_again(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    models = Models(from_values(GenerateSettings, {"task": "t2v-1.3B", "dit": "x"}, "here"), {}, CPU, keep=True)
    monkeypatch.setattr(Models, "_open_dit", lambda self, expert: frozen())
    wanted = answer(models, None)
    with monkeypatch.context() as patch:
        patch.setattr(lane, "upload", refuse)
        with pytest.raises(torch.OutOfMemoryError):
            answer(models, None)
    for _ in range(3):
        assert torch.equal(answer(models, None), wanted)
    assert lane.events[-1] == "back"


def test_blocks_that_are_streamed_stay_where_they_are(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"task": "t2v-1.3B", "dit": "x", "blocks_to_swap": 1}
    models = Models(from_values(GenerateSettings, values, "here"), {}, CPU, keep=True)
    monkeypatch.setattr(Models, "_open_dit", lambda self, expert: frozen())
    answer(models, None)
    answer(models, None)
    assert lane.events == []
