"""A model that rests in CPU RAM: copied there once, brought from there, whatever is trained left alone."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.placement.recording import Toy
from tests.unit.placement.test_states import Lane
from wan_train.models.dit.experts import HIGH, LOW, pair_of
from wan_train.placement.parking import Parking
from wan_train.training.experts.pair import PairModel


def untrained(model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.requires_grad]


def parked_pair(lane: Lane, dtype: torch.dtype) -> tuple[PairModel, dict[str, Toy]]:
    """Two experts as they are loaded: the one for high noise is there."""
    experts = {HIGH: Toy(2, dtype), LOW: Toy(2, dtype)}
    for parameter in experts[LOW].parameters():
        if parameter.is_floating_point() and parameter.itemsize > 1:
            parameter.data.mul_(2)
    parkings = {expert: Parking(model, lane) for expert, model in experts.items()}
    parkings[LOW].park()
    return PairModel(pair_of(experts), parkings=pair_of(parkings)), experts


def answers(pair: PairModel, expert: str) -> Tensor:
    pair.of(expert)
    with torch.no_grad():
        found: Tensor = pair(torch.ones(1, 2, 8))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_each_frozen_weight_is_copied_to_main_memory_once_and_comes_from_there(dtype: torch.dtype) -> None:
    lane = Lane()
    pair, experts = parked_pair(lane, dtype)
    wanted = {expert: experts[expert](torch.ones(1, 2, 8)).detach() for expert in (HIGH, LOW)}
    each, needed = len(untrained(experts[HIGH])), sum(t.nbytes for model in experts.values() for t in untrained(model))
    for turn in range(4):
        for expert in (LOW, HIGH):
            assert torch.equal(answers(pair, expert), wanted[expert])
            if turn:
                assert lane.events == ["back"] * each
            lane.events.clear()
    assert len(lane.hosts) == 2 * each and lane.far() == needed


def test_what_rests_has_nothing_on_the_device_and_can_be_read() -> None:
    lane = Lane()
    pair, experts = parked_pair(lane, torch.bfloat16)
    for expert, other in ((LOW, HIGH), (HIGH, LOW), (LOW, HIGH)):
        pair.of(expert)
        homes = {memory() for memory in lane.hosts}
        assert all(tensor.untyped_storage() in homes for tensor in untrained(experts[other]))
        assert not any(tensor.untyped_storage() in homes for tensor in untrained(experts[expert]))
    plain = Toy(2, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(untrained(experts[HIGH]), untrained(plain), strict=True))


def test_what_is_trained_stays_and_what_was_written_goes_back() -> None:
    lane = Lane()
    pair, experts = parked_pair(lane, torch.float32)
    trained = {p: p.data_ptr() for model in experts.values() for p in model.parameters() if p.requires_grad}
    written = experts[HIGH].blocks[0].norm.weight
    for count in range(1, 4):
        pair.of(HIGH)
        with torch.no_grad():
            written.add_(1)
        lane.events.clear()
        pair.of(LOW)
        # At first all of it has no copy yet.
        assert count == 1 or lane.events.count("out") == 1
        assert torch.equal(written, torch.full_like(written, 1.0 + count))
    pair.of(HIGH)
    lane.finish()
    assert torch.equal(written, torch.full_like(written, 4.0))
    assert all(parameter.data_ptr() == address for parameter, address in trained.items())


def test_a_tensor_with_gaps_and_an_empty_one_come_back_as_they_were() -> None:
    lane, model = Lane(), nn.Module()
    model.register_buffer("turned", torch.arange(6.0).view(2, 3).t())
    model.register_buffer("gaps", torch.arange(12.0).view(3, 4)[:, 1:3])
    model.register_buffer("empty", torch.zeros(0, 3))
    model.register_buffer("one", torch.tensor(5))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    parking = Parking(model, lane)
    for _ in range(2):
        parking.park()
        parking.bring()
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_what_came_for_a_preview_serves_the_training_after_it() -> None:
    pair, experts = parked_pair(Lane(), torch.float32)
    with torch.inference_mode():
        answers(pair, LOW)
    pair(torch.ones(1, 2, 8)).sum().backward()
    answers(pair, HIGH)
    pair(torch.ones(1, 2, 8)).sum().backward()
    assert all(p.grad is not None for model in experts.values() for p in model.parameters() if p.requires_grad)


def test_where_one_expert_finds_no_room_the_other_answers_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preview that fails costs a warning: the training continues with the expert that was there."""
    lane = Lane()
    pair, _ = parked_pair(lane, torch.float32)
    wanted = {expert: answers(pair, expert) for expert in (LOW, HIGH)}
    upload, calls = lane.upload, itertools.count()

    def refuse_one(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return upload(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(lane, "upload", refuse_one)
        with pytest.raises(torch.OutOfMemoryError):
            pair.of(LOW)
    assert pair.active == HIGH
    for expert in (HIGH, LOW, HIGH):
        assert torch.equal(answers(pair, expert), wanted[expert])
