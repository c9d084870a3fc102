"""States of an optimizer in main memory: brought in time, sent back whole, however late copies are made."""

import pytest
import torch
from torch import Tensor

from tests.unit.memory.test_offload import LazyLane
from wan_train.memory.states import HostStates


class Lane(LazyLane):
    """One that can be waited for."""

    def finish(self) -> None:
        self.wait(len(self.queue))


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
    assert lane.far() <= taken * 2  # one weight's are on their way while the next one's come


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
