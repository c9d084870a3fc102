"""States of an optimizer in CPU RAM: brought in time, sent back whole, however late copies are made."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.placement.test_offload import LazyLane
from wan_train.placement.states import HostStates
from wan_train.storage import read_parts, save_parts


class Lane(LazyLane):
    """One that can be waited for."""

    def finish(self) -> None:
        for direction, queue in self.queues.items():
            self.wait((direction, len(queue)))


def stepped(states: HostStates, all_states: dict[str, dict[str, object]], order: str) -> None:
    for owner in order:
        with states.at_hand(owner, all_states[owner]):
            state = all_states[owner]
            if not state:
                state |= {"step": torch.tensor(0.0), "mean": torch.zeros(4, 3), "codes": torch.zeros(7).byte()}
            assert isinstance(state["mean"], Tensor) and isinstance(state["codes"], Tensor)
            state["step"] += 1  # type: ignore[operator]
            state["mean"] += ord(owner)
            state["codes"] += 1
    states.settle()


@pytest.mark.parametrize("later", ["abc", "cab", "b", "ba"])
def test_what_comes_back_is_what_was_left(later: str) -> None:
    lane = Lane()
    states, everything = HostStates(lane), {owner: {} for owner in "abc"}  # type: ignore[var-annotated]
    for count, order in enumerate(["abc", "abc", later, "abc"]):
        stepped(states, everything, order)
        for owner in "abc":
            done = sum(owner in some for some in ["abc", "abc", later, "abc"][: count + 1])
            assert torch.equal(everything[owner]["mean"], torch.full((4, 3), float(done * ord(owner))))
            assert torch.equal(everything[owner]["codes"], torch.full((7,), done, dtype=torch.uint8))
            assert everything[owner]["step"] == done


def test_between_steps_the_tensors_are_main_memory_and_no_more_of_it_is_taken() -> None:
    lane = Lane()
    states, everything = HostStates(lane), {owner: {} for owner in "abcd"}  # type: ignore[var-annotated]
    stepped(states, everything, "abcd")
    homes = {memory() for memory in lane.hosts}
    for state in everything.values():
        assert state["mean"].untyped_storage() in homes and state["codes"].untyped_storage() in homes
    taken = lane.far()
    for _ in range(3):
        stepped(states, everything, "abcd")
    assert lane.far() == taken and len(lane.hosts) == 8


def test_the_next_weights_states_are_fetched_before_its_turn() -> None:
    lane = Lane()
    states, everything = HostStates(lane), {owner: {} for owner in "abc"}  # type: ignore[var-annotated]
    stepped(states, everything, "abc")
    lane.events.clear()
    with states.at_hand("a", everything["a"]):
        assert lane.events == ["back"] * 4  # of a, and of b


def test_a_state_that_was_loaded_goes_to_the_device_for_its_turn() -> None:
    states = HostStates(Lane())
    state = {"mean": torch.ones(3), "step": 4}
    with states.at_hand("a", state):
        state["mean"] += 1  # type: ignore[operator]
    states.settle()
    assert torch.equal(state["mean"], torch.full((3,), 2.0)) and state["step"] == 4  # type: ignore[arg-type]


def shift(states: HostStates, everything: dict[str, dict[str, Any]], order: str, made: dict[str, int]) -> None:
    """A step of each weight in this order; its state gets a number for each of `made` at the first."""
    for owner in order:
        with states.at_hand(owner, everything[owner]):
            mean = everything[owner].setdefault("mean", torch.zeros(made.get(owner, 1)))
            mean += ord(owner)


@pytest.mark.parametrize("settling", [True, False])
def test_each_state_has_a_host_buffer_of_its_size_for_life(settling: bool, tmp_path: Path) -> None:
    """Matrices and biases in turn: none sits in another's buffer, in memory or in a saved file."""
    lane, sizes = Lane(), {"a": 1000, "b": 10, "c": 1000, "d": 10}
    states, everything = HostStates(lane), {owner: {} for owner in sizes}  # type: ignore[var-annotated]
    made = []
    for _ in range(10):
        shift(states, everything, "abcd", sizes)
        if settling:
            states.settle()
        made.append(len(lane.hosts))
    states.settle()
    needed = 4 * sum(sizes.values())
    assert made == [4] * 10 and lane.far() == needed
    save_parts(tmp_path / "run.pt", everything)
    assert (tmp_path / "run.pt").stat().st_size < needed + 4096
    assert all(
        torch.equal(state["mean"], everything[o]["mean"]) for o, state in read_parts(tmp_path / "run.pt").items()
    )
    assert all(float(everything[owner]["mean"][-1]) == 10 * ord(owner) for owner in sizes)


@pytest.mark.parametrize("order", ["a", "aa", "ab"])
def test_one_weight_or_two_whose_states_are_still_leaving(order: str) -> None:
    lane, sizes = Lane(), {"a": 5, "b": 3}
    states, everything = HostStates(lane), {owner: {} for owner in order}  # type: ignore[var-annotated]
    for _ in range(4):
        shift(states, everything, order, sizes)
    states.settle()
    assert len(lane.hosts) == len(set(order))
    for owner in set(order):
        assert torch.equal(
            everything[owner]["mean"], torch.full((sizes[owner],), 4.0 * order.count(owner) * ord(owner))
        )


def test_a_state_that_comes_later_changes_its_shape_or_goes() -> None:
    lane = Lane()
    states, everything = HostStates(lane), {owner: {} for owner in "ab"}  # type: ignore[var-annotated]
    found: list[int] = []
    for name, size in (("mean", 6), ("mean", 9), ("later", 4), ("later", 2)):
        shift(states, everything, "ab", {"a": 8, "b": 8})
        with states.at_hand("a", everything["a"]):
            everything["a"][name] = torch.full((size,), float(size))
        states.settle()
        found.append(lane.far())
        assert torch.equal(everything["a"][name], torch.full((size,), float(size)))
    assert found == [4 * (6 + 8), 4 * (9 + 8), 4 * (9 + 4 + 8), 4 * (9 + 2 + 8)]
    with states.at_hand("a", everything["a"]):
        del everything["a"]["later"]
    states.settle()
    assert lane.far() == 4 * (9 + 8)


def test_what_is_put_in_its_place_or_written_into_it_between_steps_is_what_comes() -> None:
    """As a state that is loaded in the middle of a run."""
    states, everything = HostStates(Lane()), {owner: {} for owner in "ab"}  # type: ignore[var-annotated]
    for _ in range(2):
        shift(states, everything, "ab", {"a": 4, "b": 4})
    with states.at_hand("a", everything["a"]):
        pass  # what b needs is on its way
    states.settle()
    everything["a"]["mean"] = torch.ones(4)
    everything["b"]["mean"].fill_(2.0)
    shift(states, everything, "ab", {})
    states.settle()
    assert everything["a"]["mean"].tolist() == [1.0 + ord("a")] * 4
    assert everything["b"]["mean"].tolist() == [2.0 + ord("b")] * 4


def test_what_was_fetched_for_another_order_leaves_the_device() -> None:
    lane = Lane()
    states, everything = HostStates(lane), {owner: {} for owner in "abcdef"}  # type: ignore[var-annotated]
    shift(states, everything, "abcdef", dict.fromkeys("abcdef", 5))
    states.settle()
    shift(states, everything, "acebdf", {})  # after a, c and e another one was expected
    on_device = [kept for own in states._kept.values() for kept in own.values() if kept._near is not None]
    assert len(on_device) <= 2  # what leaves still, and what comes
