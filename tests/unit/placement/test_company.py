"""Everything at once, in the order of `assemble`: blocks in parts, compiled, streamed, recomputed, offloaded."""

import pytest
import torch

from tests.unit.placement.blocks import CONFIG, Stack, step, tokens
from tests.unit.placement.counting import Meter, close, same
from wan_train.placement.chunks import apply_chunks
from wan_train.placement.lanes import make_lane
from wan_train.placement.recompute import apply_recompute
from wan_train.placement.settings import RecomputeSettings, StreamSettings
from wan_train.placement.stream import apply_stream

CPU = torch.device("cpu")


def burdened(mode: str, *, chunks: int, offload: bool, backend: str | None = None, dropout: float = 0.0) -> Stack:
    stack = Stack(dropout=dropout)
    apply_chunks(stack.blocks, chunks)
    if backend:
        for block in stack.blocks:
            block.forward = torch.compile(block.forward, backend=backend)
    apply_stream(stack.blocks, StreamSettings(blocks_to_swap=2), make_lane(CPU))
    settings = RecomputeSettings(recompute=mode, gradient_checkpointing_cpu_offload=offload)
    apply_recompute(stack.blocks, settings, CPU)
    return stack


@pytest.mark.parametrize("mode", ["full", "keep_attention"])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
def test_outputs_and_gradients_are_the_same(mode: str, offload: bool, chunks: int) -> None:
    stack, plain = burdened(mode, chunks=chunks, offload=offload), Stack()
    for number in range(3):
        inputs = tokens(seed=number), tokens(seed=number + 9, batch=1, frames=1 + number)
        ours, theirs = step(stack, *inputs), step(plain, *inputs)
        assert same(ours, theirs) if chunks == 1 else close(ours, theirs)
        with torch.no_grad():
            assert close([stack(inputs[1])], [plain(inputs[1])])


@pytest.mark.parametrize("offload", [False, True])
def test_dropout_and_attention_calls(offload: bool) -> None:
    stack = burdened("keep_attention", chunks=1, offload=offload, dropout=0.5)
    with Meter() as meter:
        ours = step(stack, tokens())
    assert meter.attentions == 2 * CONFIG.num_layers
    assert same(ours, step(Stack(dropout=0.5), tokens()))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "keep_attention"])
def test_compiled_as_well(mode: str) -> None:
    torch._dynamo.reset()
    stack, plain = burdened(mode, chunks=2, offload=True, backend="inductor"), Stack()
    for inputs in (tokens(), tokens(frames=3), tokens()):
        assert close(step(stack, inputs), step(plain, inputs))
