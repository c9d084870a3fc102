"""Which activations each mode keeps, what it computes twice, and that nothing else changes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.unit.placement.blocks import CONFIG, Stack, step, take_gradients, tokens
from tests.unit.placement.counting import Meter, close, nbytes, same
from wan_train.errors import InputError
from wan_train.placement import recompute
from wan_train.placement.recompute import apply_recompute
from wan_train.placement.settings import CompileSettings, RecomputeSettings, check_recompute

CPU = torch.device("cpu")
ONE = replace(CONFIG, num_layers=1)
MODES = ("none", "full", "keep_attention")


def recomputed(mode: str, *, dropout: float = 0.0) -> Stack:
    stack = Stack(dropout=dropout)
    apply_recompute(stack.blocks, RecomputeSettings(recompute=mode), CPU)
    return stack


def kept(mode: str) -> int:
    """Bytes that are alive between the forward and the backward pass, beside what the step itself holds."""
    stack = recomputed(mode)
    x = tokens().requires_grad_()
    with Meter() as meter:
        out = stack(x)
        live = meter.live()
    return live - nbytes(out)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_outputs_and_gradients_are_the_same(mode: str, dropout: float) -> None:
    expected = step(Stack(dropout=dropout), tokens())
    assert same(step(recomputed(mode, dropout=dropout), tokens()), expected)


@pytest.mark.parametrize("mode", MODES[1:])
def test_two_forward_passes_before_one_backward_pass(mode: str) -> None:
    """Of different length, with dropout, and with a pass without gradients between them."""
    inputs = tokens(), tokens(seed=9, batch=1, frames=3)
    stack = recomputed(mode, dropout=0.5)
    expected = step(Stack(dropout=0.5), *inputs)
    assert same(step(stack, *inputs), expected)

    torch.manual_seed(8)
    outputs = [stack(inputs[0])]
    with torch.no_grad():
        state = torch.get_rng_state()
        stack(inputs[1])
        torch.set_rng_state(state)
    outputs.append(stack(inputs[1]))
    for output in outputs:  # the order of the passes, not the reverse
        output.square().mean().backward()
    assert close(take_gradients(stack), expected[2:])


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_that_is_kept_gives_its_gradients_twice(mode: str) -> None:
    stack = recomputed(mode)
    loss = stack(tokens()).square().mean()
    loss.backward(retain_graph=True)
    first = take_gradients(stack)
    loss.backward()
    assert same(take_gradients(stack), first)


@pytest.mark.parametrize(("mode", "passes"), [("none", 1), ("full", 2), ("keep_attention", 1)])
def test_attention_is_computed_so_often(mode: str, passes: int) -> None:
    with Meter() as meter:
        step(recomputed(mode), tokens())
    assert meter.attentions == passes * 2 * CONFIG.num_layers


@pytest.mark.parametrize("mode", MODES)
def test_without_gradients_everything_is_computed_once_and_nothing_kept(mode: str) -> None:
    stack = recomputed(mode)
    with torch.no_grad(), Meter() as meter:
        out = stack(tokens())
        live = meter.live()
    assert meter.attentions == 2 * CONFIG.num_layers
    assert live <= 2 * nbytes(out)  # and the input
    assert torch.equal(out, Stack()(tokens()))


def test_what_each_mode_keeps() -> None:
    x = tokens()
    sums = 4 * x.shape[0] * x.shape[1] * CONFIG.num_heads
    attention = CONFIG.num_layers * 2 * (nbytes(x) + sums)
    none, full, keep_attention = (kept(mode) for mode in MODES)
    assert keep_attention - full == attention
    assert none > 3 * keep_attention


def test_full_keeps_the_inputs_of_blocks() -> None:
    """Against one block: each further one adds its input to what is alive."""

    def live(num_layers: int) -> int:
        stack = recomputed("full")
        del stack.blocks[num_layers:]
        with Meter() as meter:
            out = stack(tokens())
            return meter.live() if out.requires_grad else 0

    assert live(3) - live(2) == live(2) - live(1) == nbytes(tokens())


def test_attention_by_an_unknown_operator_is_computed_again() -> None:
    """By its parts, of which none is in the table."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        return (F.softmax(query @ key.mT / query.shape[-1] ** 0.5, dim=-1) @ value).transpose(1, 2)

    results = []
    for mode in MODES:
        stack = Stack()
        for block in stack.blocks:
            block.self_attn.attend = block.cross_attn.attend = attend
        apply_recompute(stack.blocks, RecomputeSettings(recompute=mode), CPU)
        results.append(step(stack, tokens()))
    assert same(results[1], results[0])
    assert same(results[2], results[0])


def test_attention_in_several_calls_of_its_operator() -> None:
    """As when a batch is split: each call gets its own result back."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = zip(query.split(1), key.split(1), value.split(1), strict=True)
        parts = [F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in row)) for row in rows]
        return torch.cat(parts).transpose(1, 2)

    stack = Stack()
    for block in stack.blocks:
        block.self_attn.attend = attend
    apply_recompute(stack.blocks, RecomputeSettings(recompute="keep_attention"), CPU)
    with Meter() as meter:
        results = step(stack, tokens())
    assert meter.attentions == 3 * CONFIG.num_layers
    assert close(results, step(Stack(), tokens()))


@pytest.mark.parametrize("mode", MODES[1:])
def test_weights_that_come_for_each_use_come_for_the_second_pass(mode: str) -> None:
    """A block that is streamed has its weights for the length of a call, and something else there at other times."""

    def visiting(block: Any, forward: Callable[..., Tensor], uses: list[int]) -> Callable[..., Tensor]:
        linears = [part for part in block.modules() if isinstance(part, torch.nn.Linear)]
        homes = [linear.weight.data for linear in linears]

        def call(*args: Tensor) -> Tensor:
            for linear, home in zip(linears, homes, strict=True):
                linear.weight.data = home.clone()
            uses.append(1)
            return forward(*args)

        for linear in linears:
            linear.weight.data = torch.full_like(linear.weight, float("nan"))
        return call

    stack, uses = Stack(), []
    for block in stack.blocks:
        block.forward = visiting(block, block.forward, uses)
    apply_recompute(stack.blocks, RecomputeSettings(recompute=mode), CPU)
    assert same(step(stack, tokens()), step(Stack(), tokens()))
    assert len(uses) == 2 * CONFIG.num_layers


@pytest.mark.parametrize(
    ("mode", "backend"),
    [
        ("full", "eager"),
        pytest.param("full", "inductor", marks=pytest.mark.slow),
        pytest.param("keep_attention", "inductor", marks=pytest.mark.slow),
    ],
)
def test_around_compiled_blocks(mode: str, backend: str) -> None:
    torch._dynamo.reset()
    stack = Stack(config=ONE)
    for block in stack.blocks:
        block.forward = torch.compile(block.forward, backend=backend)
    apply_recompute(stack.blocks, RecomputeSettings(recompute=mode), CPU)
    assert close(step(stack, tokens()), step(Stack(config=ONE), tokens()))


def test_compiled_blocks_keep_their_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the operator itself: a block that a mode looks at is not compiled."""
    calls = []

    @torch.library.custom_op("wan_train_tests::attend", mutates_args=())
    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        weights = F.softmax(torch.einsum("BLND,BSND->BNLS", query, key), dim=-1)
        return torch.einsum("BNLS,BSND->BLND", weights, value), weights.sum(-1)

    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, out = ctx.saved_tensors
        return grad * query, key * grad.sum(1, keepdim=True), value * out.sum(1, keepdim=True)

    def run(mode: str, *, backend: str | None = None) -> tuple[list[Tensor], int]:
        stack = Stack(config=ONE)
        for block in stack.blocks:
            block.self_attn.attend = lambda *inputs: attend(*inputs)[0]
            if backend:
                block.forward = torch.compile(block.forward, backend=backend)
        apply_recompute(stack.blocks, RecomputeSettings(recompute=mode), CPU)
        calls.clear()
        return step(stack, tokens()), len(calls)

    attend.register_autograd(
        backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output[0])
    )
    monkeypatch.setattr(recompute, "ATTENTION_KERNELS", {"wan_train_tests::attend"})
    torch._dynamo.reset()
    expected, count = run("none")
    assert count == 1
    assert run("full")[1] == 2
    results, count = run("keep_attention")
    assert count == 1
    assert same(results, expected)
    results, count = run("keep_attention", backend="eager")
    assert count == 1
    assert close(results, expected)


def test_an_error_in_a_block_leaves_no_trace() -> None:
    stack = recomputed("keep_attention")
    with pytest.raises(RuntimeError):
        stack.blocks[0](tokens()[..., :-1], tokens(), tokens(), tokens())
    assert same(step(stack, tokens()), step(Stack(), tokens()))


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(InputError, match="none, full, keep_attention"):
        apply_recompute([], RecomputeSettings(recompute="some"), CPU)


def test_blocks_in_one_piece_cannot_keep_their_attention() -> None:
    keeping = RecomputeSettings(recompute="keep_attention")
    whole = CompileSettings(compile=True, compile_fullgraph=True)
    with pytest.raises(InputError, match=r"--compile_fullgraph.*--recompute keep_attention"):
        check_recompute(keeping, whole)
    check_recompute(keeping, CompileSettings(compile=True))
    check_recompute(RecomputeSettings(recompute="full"), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES[1:])
def test_on_an_accelerator(mode: str) -> None:
    """In bfloat16, in which torch's fast kernels are; what they keep beside their output is small."""
    device = torch.accelerator.current_accelerator()
    assert device is not None
    expected, stack = Stack(dropout=0.5).to(device, torch.bfloat16), Stack(dropout=0.5).to(device, torch.bfloat16)
    apply_recompute(stack.blocks, RecomputeSettings(recompute=mode), device)
    with Meter() as meter:
        results = step(stack, tokens().to(device))
    # To rounding: the backward of these kernels adds in any order.
    assert close(results, step(expected, tokens().to(device)), 0.02)
    assert meter.attentions == (2 if mode == "full" else 1) * 2 * CONFIG.num_layers
