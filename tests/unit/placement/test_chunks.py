"""The feed-forward in parts: the same numbers, fewer of them in memory at once."""

from dataclasses import replace

import pytest
import torch

from tests.unit.placement.blocks import CONFIG, Stack, step, tokens
from tests.unit.placement.counting import Meter, close, nbytes, same
from wan_train.placement.chunks import apply_chunks
from wan_train.placement.recompute import apply_recompute
from wan_train.placement.settings import RecomputeSettings

ONE = replace(CONFIG, num_layers=1)
HIDDEN = nbytes(tokens()) * CONFIG.ffn_dim // CONFIG.dim


def chunked(count: int, *, mode: str = "none", config: object = ONE, dropout: float = 0.0) -> Stack:
    stack = Stack(config=config, dropout=dropout)
    apply_chunks(stack.blocks, count)
    apply_recompute(stack.blocks, RecomputeSettings(recompute=mode), torch.device("cpu"))
    return stack


@pytest.mark.parametrize("count", [2, 5, 24, 100])
@pytest.mark.parametrize("mode", ["none", "full", "keep_attention"])
def test_outputs_and_gradients_are_the_same(count: int, mode: str) -> None:
    """To rounding: a product of fewer rows may be summed in another order. 5 does not divide the tokens."""
    assert close(step(chunked(count, mode=mode, config=CONFIG), tokens()), step(Stack(), tokens()))


def test_dropout_is_the_same_in_both_passes() -> None:
    """With and without another recomputation around it."""
    plain, recomputed = (step(chunked(3, mode=mode, dropout=0.5), tokens()) for mode in ("none", "full"))
    assert same(recomputed, plain)


def test_one_part_is_the_whole() -> None:
    stack = Stack()
    forward = stack.blocks[0].ffn.forward
    apply_chunks(stack.blocks, 1)
    assert stack.blocks[0].ffn.forward == forward


@pytest.mark.parametrize(("mode", "passes"), [("none", 2), ("full", 3), ("keep_attention", 3)])
def test_passes_of_the_feed_forward(mode: str, passes: int) -> None:
    with Meter() as meter:
        step(chunked(4, mode=mode), tokens())
    assert meter.calls["aten::gelu"] == 4 * passes


def test_hidden_activations_are_never_there_at_once() -> None:
    """In the backward pass those before and after the GELU and the gradient of the first or the second of them."""

    def peak(count: int, *, mode: str) -> int:
        stack = chunked(count, mode=mode)
        with Meter() as meter:
            out = stack(tokens())
            meter.peak = 0
            out.square().mean().backward()
        return meter.peak

    for mode in ("none", "full"):
        assert peak(1, mode=mode) - peak(6, mode=mode) > 1.5 * HIDDEN


def test_hidden_activations_are_never_there_at_once_without_gradients() -> None:
    def peak(count: int) -> int:
        with torch.no_grad(), Meter() as meter:
            chunked(count)(tokens())
        return meter.peak

    assert peak(1) - peak(6) > 0.5 * HIDDEN


@pytest.mark.parametrize(
    ("backend", "frames"), [("eager", (2,)), pytest.param("inductor", (2, 3), marks=pytest.mark.slow)]
)
def test_inside_compiled_blocks_of_one_piece(backend: str, frames: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    stack = Stack(config=ONE)
    apply_chunks(stack.blocks, 3)
    for block in stack.blocks:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)
    apply_recompute(stack.blocks, RecomputeSettings(recompute="full"), torch.device("cpu"))
    for inputs in [tokens(frames=count) for count in frames]:
        assert close(step(stack, inputs), step(Stack(config=ONE), inputs))
