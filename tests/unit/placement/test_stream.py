"""What a streamed model computes, when blocks are copied, and where they are."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.unit.placement.recording import (
    Copy,
    RecordingLane,
    Toy,
    Watch,
    all_equal,
    preview,
    sample,
    stream_toy,
    train_step,
    untouched,
)
from wan_train.placement.settings import StreamSettings
from wan_train.placement.stream import apply_stream, streamed_blocks


@settings(max_examples=40, deadline=None)
@given(
    num_blocks=st.integers(1, 7),
    count=st.integers(1, 7),
    ring=st.integers(2, 5),
    late=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn]),
    passes=st.lists(st.sampled_from([train_step, preview, sample]), min_size=1, max_size=5),
)
def test_a_streamed_model_computes_what_the_plain_one_does(
    num_blocks: int, count: int, ring: int, late: bool, dtype: torch.dtype, passes: list[Any]
) -> None:
    count = min(count, num_blocks)
    plain, streamed = Toy(num_blocks, dtype), Toy(num_blocks, dtype)
    lane = RecordingLane(late)
    stream = stream_toy(streamed, count, ring, lane)
    assert len(lane.pinned) == count and len(lane.slots) == min(ring, count)
    assert stream.device_bytes == min(ring, count) * max(len(copy) for copy in lane.pinned)
    with untouched(lane.pinned):
        for seed, run in enumerate(passes):
            with Watch(lane):
                found = run(streamed, seed)
            assert all_equal(found, run(plain, seed))
    assert len(set(lane.uploads)) == count


def test_the_recording_lane_notices_a_missing_wait_and_a_stale_mark() -> None:
    class Careless(RecordingLane):
        def wait(self, mark: Copy) -> None:
            pass

    class Hasty(RecordingLane):
        def mark(self) -> int:
            return 0

    for lane, problem in ((Careless(late=True), "before it was there"), (Hasty(late=False), "overtake")):
        toy = Toy(4)
        stream_toy(toy, 3, 2, lane)
        with pytest.raises(AssertionError, match=problem), Watch(lane):
            train_step(toy, 0)


@pytest.mark.parametrize(("count", "ring"), [(6, 2), (6, 3), (5, 5), (4, 9), (1, 2)])
def test_a_step_copies_each_block_twice_but_those_still_there_at_its_turns(count: int, ring: int) -> None:
    toy, lane = Toy(6), RecordingLane(late=True)
    stream_toy(toy, count, ring, lane)
    at_turn: list[int] = []
    ring = min(ring, count)
    for seed in range(3):
        lane.uploads.clear()
        y = toy(torch.randn(1, 2, 8))
        at_turn.append(len(lane.uploads))
        y.sum().backward()
        if seed:
            assert lane.uploads == [*range(ring, count), *reversed(range(count - ring))]
    assert at_turn == [count, count - ring, count - ring]
    if ring == count:
        after_training, once_more, training = 0, 0, 0
    else:  # a preview ends with all but one of the first blocks there, training with all of them
        after_training, once_more, training = count - 1, count, 2 * (count - ring) + 1
    for run, expected in ((preview, after_training), (preview, once_more), (train_step, training)):
        lane.uploads.clear()
        run(toy, 0)
        assert len(lane.uploads) == expected


def test_blocks_are_fetched_while_those_before_them_compute() -> None:
    toy, lane = Toy(6), RecordingLane(late=True)
    there: list[str] = []
    for block in toy.blocks:
        block.norm.register_forward_pre_hook(lambda *_: there.append("".join(map(str, sorted(lane.contents.values())))))
    stream_toy(toy, 6, 3, lane)

    def during(run: Any) -> str:
        there.clear()
        run(toy, 0)
        return " ".join(there)

    backward = "345 234 123 012 012 012"  # blocks 5, 4, 3, 2, 1, 0
    assert during(train_step) == f"012 123 234 345 345 345 {backward}"
    assert during(train_step) == f"012 123 234 345 345 345 {backward}"
    assert during(preview) == "012 123 234 345 045 015"
    assert during(preview) == "012 123 234 345 045 015"
    assert during(train_step) == f"012 123 234 345 345 345 {backward}"


def test_trained_matrices_stream_and_adapters_do_not() -> None:
    toy = Toy(2)
    toy.blocks[1].wide.weight.requires_grad_()
    stream = apply_stream(toy.blocks, StreamSettings(blocks_to_swap=1), RecordingLane(late=False))
    assert stream.names(toy) == {"blocks.1.wide.weight", "blocks.1.narrow.weight"}
    with pytest.raises(AssertionError, match="without matrices"):
        apply_stream([nn.LayerNorm(4)] * 2, StreamSettings(blocks_to_swap=1), RecordingLane(late=False))


def test_only_matrices_move_and_each_is_where_it_should_be() -> None:
    toy, lane = Toy(5, torch.float8_e4m3fn), RecordingLane(late=False)
    stream = stream_toy(toy, 2, 2, lane)
    assert streamed_blocks(5, 2) == [1, 3]
    leaves = ("wide.weight", "wide.scale_weight", "narrow.weight", "narrow.scale_weight")
    assert stream.names(toy) == {f"blocks.{i}.{leaf}" for i in (1, 3) for leaf in leaves}
    sizes = [[8 * w, 4 * w * 2, 8 * w, 4 * 8 * 2] for w in (12, 8)]  # bytes of these, widths of blocks 1 and 3
    expected = [sum(-(-size // 256) * 256 for size in some[:-1]) + some[-1] for some in sizes]
    assert [len(copy) for copy in lane.pinned] == expected and stream.host_bytes == sum(expected)

    def homes() -> list[str]:
        slots = set(lane.slots)
        addresses = {copy.untyped_storage().data_ptr() for copy in lane.pinned}
        found = [block.wide.weight.untyped_storage().data_ptr() for block in toy.blocks]
        return ["slot" if f in slots else "pinned" if f in addresses else "own" for f in found]

    assert homes() == ["own", "pinned", "own", "pinned", "own"]
    preview(toy, 0)
    assert homes() == ["own", "slot", "own", "slot", "own"]
    stream.settle()
    assert homes() == ["own", "pinned", "own", "pinned", "own"]


@pytest.mark.parametrize(("num_blocks", "count"), [(40, 39), (40, 20), (40, 1), (30, 29), (30, 7)])
def test_streamed_blocks_are_spread_evenly(num_blocks: int, count: int) -> None:
    chosen = streamed_blocks(num_blocks, count)
    assert len(set(chosen)) == count and chosen == sorted(chosen) and chosen[-1] < num_blocks
    gaps = {b - a for a, b in pairwise(chosen)}
    assert gaps <= {num_blocks // count, math.ceil(num_blocks / count)}


def test_each_block_is_packed_before_memory_for_the_next_is_taken() -> None:
    toy, lane = Toy(4), RecordingLane(late=False)

    def earlier_blocks_are_packed() -> None:
        addresses = {copy.untyped_storage().data_ptr() for copy in lane.pinned}
        homes = {block.wide.weight.untyped_storage().data_ptr() for block in toy.blocks}
        assert homes >= addresses

    lane.on_host = earlier_blocks_are_packed
    apply_stream(toy.blocks, StreamSettings(blocks_to_swap=4), lane)
    assert len(lane.pinned) == 4


def test_no_blocks_to_swap_changes_nothing() -> None:
    toy, lane = Toy(2), RecordingLane(late=False)
    before = dict(toy.blocks[0].__dict__)
    stream = apply_stream(toy.blocks, StreamSettings(), lane)
    assert toy.blocks[0].__dict__ == before and not lane.pinned and not lane.slots
    assert stream.host_bytes == stream.device_bytes == 0 and stream.names(toy) == set()


def test_a_state_dict_holds_every_weight_and_later_passes_leave_it_alone() -> None:
    plain, toy, lane = Toy(5), Toy(5), RecordingLane(late=False)
    stream_toy(toy, 4, 2, lane)
    preview(toy, 0)
    state = toy.eval().state_dict()
    assert not {value.untyped_storage().data_ptr() for value in state.values()} & lane.slots.keys()
    train_step(toy.train(), 0)
    preview(toy, 1)
    frozen = {name for name, p in plain.named_parameters() if not p.requires_grad}
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items() if name in frozen)


@contextmanager
def failing(block: nn.Module, call: int) -> Iterator[None]:
    """Let a call of the block, counted from 1, raise an error."""
    calls = iter(range(1, call + 1))

    def hook(*_: Any) -> None:
        if next(calls) == call:
            raise ValueError("no memory")

    handle = block.norm.register_forward_hook(hook)
    with pytest.raises(ValueError, match="no memory"):
        yield
    handle.remove()


def test_an_error_in_the_middle_of_a_pass_leaves_the_engine_usable() -> None:
    plain, toy, lane = Toy(5), Toy(5), RecordingLane(late=True)
    stream_toy(toy, 5, 2, lane)
    for seed, (run, call) in enumerate([(preview, 1), (train_step, 1), (train_step, 2)]):  # the last in its backward
        with failing(toy.blocks[3], call):
            run(toy, seed)
        toy.zero_grad()
        with Watch(lane):
            found = train_step(toy, seed)
        assert all_equal(found, train_step(plain, seed))


def test_a_copy_that_fails_is_done_again() -> None:
    plain, toy, lane = Toy(5), Toy(5), RecordingLane(late=True)
    stream_toy(toy, 5, 2, lane)
    assert all_equal(train_step(toy, 0), train_step(plain, 0))
    lane.broken = True  # when block 2 should take the place of block 0
    with pytest.raises(ValueError, match="no memory"):
        preview(toy, 0)
    lane.broken = False
    assert all_equal(train_step(toy, 0), train_step(plain, 0))


def test_a_backward_pass_without_checkpointing_fails_instead_of_being_wrong() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        toy = Toy(4, dtype)
        apply_stream(toy.blocks, StreamSettings(blocks_to_swap=4), RecordingLane(late=False))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            train_step(toy, 0)


def test_two_passes_before_one_backward_pass() -> None:
    plain, toy, lane = Toy(5), Toy(5), RecordingLane(late=True)
    stream_toy(toy, 4, 2, lane)

    def grads(model: nn.Module) -> list[Tensor]:
        (model(torch.ones(1, 2, 8)).sum() + model(torch.full((1, 2, 8), 0.5)).square().sum()).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    with Watch(lane):
        found = grads(toy)
    assert all_equal(found, grads(plain))
