"""Trained matrices that stream: stepped on the device, written back, however late copies are made."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.unit.placement.recording import RecordingLane, Toy, Watch, preview, stream_toy
from wan_train.placement.stream import Stream


def trainable(num_blocks: int, some: int) -> Toy:
    """Every matrix of the first blocks is trained; of the others one in each."""
    toy = Toy(num_blocks)
    for index, block in enumerate(toy.blocks):
        for linear in (block.wide, block.narrow)[: 2 if index < some else 1]:
            linear.weight.requires_grad_(True)
    return toy


def step_block(block: nn.Module) -> None:
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)
                parameter.grad = None


def ordinary(toy: Toy, stream: Stream | None, seed: int) -> None:
    """A step after the backward pass, block by block."""
    loss_of(toy, seed).backward()
    for block in toy.blocks:
        with torch.no_grad(), stream.held(block.parameters()) if stream else unheld():
            step_block(block)


def fused(toy: Toy, stream: Stream | None, seed: int) -> None:
    """A step inside of the backward pass."""
    handles: list[Any] = []
    for block in toy.blocks:
        trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
        missing = [len(trained)]

        def arrived(_: Tensor, block: nn.Module, missing: list[int]) -> None:
            missing[0] -= 1
            if missing[0] == 0:
                with torch.enable_grad(), stream.held(block.parameters()) if stream else unheld():
                    step_block(block)

        hook = partial(arrived, block=block, missing=missing)
        handles += [parameter.register_post_accumulate_grad_hook(hook) for parameter in trained]
    loss_of(toy, seed).backward()
    for handle in handles:
        handle.remove()


@contextmanager
def unheld() -> Iterator[None]:
    yield


def loss_of(toy: Toy, seed: int) -> Tensor:
    return toy(torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed))).square().mean()


@settings(max_examples=30, deadline=None)
@given(
    num_blocks=st.integers(2, 6),
    count=st.integers(1, 6),
    ring=st.integers(2, 4),
    some=st.integers(0, 6),
    late=st.sampled_from([(False, False), (True, False), (True, True)]),
    kinds=st.lists(st.sampled_from([ordinary, fused]), min_size=1, max_size=4),
    between=st.sampled_from(["nothing", "settle", "forget", "preview"]),
)
def test_a_streamed_model_learns_what_the_plain_one_does(
    num_blocks: int, count: int, ring: int, some: int, late: tuple[bool, bool], kinds: list[Any], between: str
) -> None:
    plain, streamed = trainable(num_blocks, some), trainable(num_blocks, some)
    lane = RecordingLane(*late)
    stream = stream_toy(streamed, min(count, num_blocks), ring, lane)
    start = [parameter.detach().clone() for parameter in plain.parameters()]
    for seed, kind in enumerate(kinds):
        with Watch(lane):
            kind(streamed, stream, seed)
        kind(plain, None, seed)
        if between == "preview":
            assert torch.equal(*(preview(toy, 9)[0] for toy in (plain, streamed)))
        elif between != "nothing":
            getattr(stream, between)()
    stream.settle()
    for found, wanted in zip(streamed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, wanted)
    assert any(not torch.equal(a, b) for a, b in zip(start, plain.parameters(), strict=True))
    assert lane.stores  # something was written back


def test_a_step_writes_each_trained_block_back_once_and_no_frozen_one() -> None:
    toy, lane = Toy(4), RecordingLane(late=True)
    for index in (1, 3):
        toy.blocks[index].wide.weight.requires_grad_(True)
    stream = stream_toy(toy, 4, 2, lane)
    fused(toy, stream, 0)
    assert sorted(lane.stores) == [1, 3]


def test_what_is_written_after_forgetting_is_what_blocks_see() -> None:
    plain, toy = trainable(4, 4), trainable(4, 4)
    stream = stream_toy(toy, 3, 2, RecordingLane(late=False))
    preview(toy, 0)
    stream.forget()
    for model in (plain, toy):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
    assert torch.equal(preview(toy, 1)[0], preview(plain, 1)[0])


def test_an_upload_that_does_not_wait_for_a_download_is_noticed() -> None:
    """The two directions overlap: what fills a slot waits for what leaves it."""

    class Careless(RecordingLane):
        def upload(self, target: Tensor, source: Tensor, *after: Any) -> Any:
            return super().upload(target, source, after[0])

    plain, toy = trainable(4, 4), trainable(4, 4)
    stream = stream_toy(toy, 4, 2, Careless(late=True))
    for seed in range(2):
        fused(plain, None, seed)
        fused(toy, stream, seed)
    stream.settle()
    assert any(not torch.equal(a, b) for a, b in zip(toy.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("careless", ["store", "wait"])
def test_the_recording_lane_notices_a_store_that_is_not_waited_for(careless: str) -> None:
    class Careless(RecordingLane):
        def wait(self, mark: Any) -> None:
            if careless != "wait" or not self.stores:
                super().wait(mark)

        def mark(self) -> int:
            return 0 if careless == "store" else super().mark()

    toy, lane = trainable(3, 3), Careless(late=True)
    stream = stream_toy(toy, 3, 3, lane)
    with pytest.raises(AssertionError, match=r"stored|overtake"), Watch(lane):
        for seed in range(2):
            fused(toy, stream, seed)
