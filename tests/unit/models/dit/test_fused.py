"""The functions that compile to kernels, uncompiled, against torch's operators, forward and backward."""

import copy

import pytest
import torch
from torch import Tensor

from tests.parity.golden import relative_error
from wan_train.fusing import set_kernels
from wan_train.models.dit.block import Block
from wan_train.models.dit.dit import DitConfig
from wan_train.models.dit.elementwise import PLAIN, Modulation
from wan_train.models.dit.fused import PURE, Fused
from wan_train.models.dit.norms import LayerNorm, norm_rope
from wan_train.models.dit.rope import rope_table

CONFIG = DitConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=1, text_dim=8)
FUSED = Fused(PURE)


def block_twins() -> tuple[Block, Block]:
    """A block with random weights, all frozen, and a copy that uses the fused functions."""
    torch.manual_seed(0)
    plain = Block(CONFIG).requires_grad_(False)
    for weight in plain.parameters():
        weight.data = torch.randn(weight.shape) / max(weight.shape[-1], 4) ** 0.5
    fused = copy.deepcopy(plain)
    set_kernels([fused], PURE)
    return plain, fused


def passes(block: Block, dtype: torch.dtype, groups: int = 3) -> list[Tensor]:
    """The output, and the gradients of the tokens and of what learns."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 24, 48, generator=generator).requires_grad_()
    context = torch.randn(2, 5, 48, generator=generator).to(dtype)
    time = torch.randn(2, groups, 6, 48, generator=generator)
    out = block(x, context, time, rope_table((3, 2, 4), 24, device=torch.device("cpu")))
    learning = [p for p in block.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *learning])]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_a_block_gives_the_same(dtype: torch.dtype, tolerance: float, groups: int) -> None:
    plain, fused = block_twins()
    for ours, right in zip(passes(fused, dtype, groups), passes(plain, dtype, groups), strict=True):
        assert ours.dtype is right.dtype
        assert relative_error(ours, right) < tolerance


def test_what_else_learns_gets_its_gradients() -> None:
    plain, fused = block_twins()
    plain.requires_grad_(True)
    fused.requires_grad_(True)
    for ours, right in zip(passes(fused, torch.float32), passes(plain, torch.float32), strict=True):
        torch.testing.assert_close(ours, right, atol=0, rtol=0)


def test_frozen_blocks_leave_torchs_operators() -> None:
    """Otherwise the parity above would compare the same code."""
    plain, fused = block_twins()
    assert plain.elementwise is PLAIN and plain.self_attn.norm_q.norm_rope is norm_rope
    assert isinstance(fused.elementwise, Fused)
    called: list[str] = []

    def noted(function):  # type: ignore[no-untyped-def]
        return lambda *args: (called.append(function.__name__), function(*args))[1]

    set_kernels([fused], PURE.each(noted))
    passes(fused, torch.float32)
    assert set(called) == set(vars(PURE))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_the_norm_of_heads(dtype: torch.dtype, tolerance: float, turned: bool) -> None:
    torch.manual_seed(0)
    x, weight, target = torch.randn(2, 12, 24).to(dtype), torch.randn(24), torch.randn(2, 12, 2, 12)
    rope = rope_table((2, 2, 3), 12, device=torch.device("cpu")) if turned else None
    results = []
    for function in (FUSED.norm_rope, norm_rope):
        given = x.clone().requires_grad_()
        out = function(given, weight, rope, 1e-6, 2)
        results.append([out.detach(), *torch.autograd.grad((out.float() * target).sum(), given)])
    for ours, right in zip(*results, strict=True):
        assert ours.dtype is right.dtype
        assert relative_error(ours, right) < tolerance


def test_gradients_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    x, update = (torch.randn(1, 6, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    gate, shift, scale = (torch.randn(1, 2, 8, dtype=torch.float64) for _ in range(3))
    norm = LayerNorm(8, elementwise_affine=False)

    def composed(x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        return FUSED.add_normalise(x, update, gate, norm, Modulation(shift, scale), torch.float64)

    # In float32 inside: a wide step and a wide tolerance.
    assert torch.autograd.gradcheck(composed, (x, update), eps=1e-2, atol=2e-2, rtol=2e-2)


def test_without_gradients_a_block_gives_the_same_and_leaves_its_inputs() -> None:
    plain, _ = block_twins()
    x, context, time = torch.randn(2, 24, 48), torch.randn(2, 5, 48), torch.randn(2, 3, 6, 48)
    rope = rope_table((3, 2, 4), 24, device=torch.device("cpu"))
    before = [tensor.clone() for tensor in (x, context, time)]
    expected = plain(x, context, time, rope)
    with torch.no_grad():
        assert torch.equal(plain(x, context, time, rope), expected)
    assert all(torch.equal(now, then) for now, then in zip((x, context, time), before, strict=True))
