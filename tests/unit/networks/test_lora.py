"""The branch itself: what it computes, its gradients, and the company that it keeps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks.deltas.branch import attach_branch
from networks.deltas.lora import LoraBranch, initial_down
from networks.lora_wan import attach, targets
from networks.settings import NetworkSettings
from wan_train.models.dit.dit import Dit, DitConfig
from wan_train.precision import Linear


def branched(inputs: int = 6, outputs: int = 9, rank: int = 2, *, dropout: float = 0.0) -> Linear:
    torch.manual_seed(3)
    linear = Linear(inputs, outputs).requires_grad_(False)
    branch = LoraBranch(torch.randn(rank, inputs), torch.randn(outputs, rank), scale=0.37, dropout=dropout)
    attach_branch(linear, branch)
    return linear


def naive(linear: nn.Linear, x: Tensor) -> Tensor:
    lora = linear.lora
    return F.linear(x, linear.weight, linear.bias) + 0.37 * F.linear(F.linear(x, lora.down.weight), lora.up.weight)


def gradients(linear: nn.Linear, x: Tensor, out: Tensor) -> list[Tensor]:
    wanted = [linear.lora.down.weight, linear.lora.up.weight, *([x] if x.requires_grad else [])]
    # The input is read by others too: what the branch adds to its own gradient must not reach theirs.
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() + (x**3).sum()
    return list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6), (1, 5, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("through_input", [True, False])
def test_output_and_gradients_are_those_of_the_formula(shape: tuple[int, ...], through_input: bool) -> None:
    linear = branched().double()
    x = torch.randn(shape, dtype=torch.float64).requires_grad_(through_input)
    ours, theirs = linear(x), naive(linear, x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for got, wanted in zip(gradients(linear, x, ours), gradients(linear, x, theirs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_input_that_is_not_contiguous() -> None:
    linear = branched().double()
    x = torch.randn(6, 5, 2, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    ours, theirs = linear(x), naive(linear, x)
    torch.testing.assert_close(ours, theirs)
    for got, wanted in zip(gradients(linear, x, ours), gradients(linear, x, theirs), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_second_backward_pass_adds_the_same_again() -> None:
    linear = branched()
    x = torch.randn(2, 5, 6, requires_grad=True)
    loss = linear(x).square().sum()
    loss.backward(retain_graph=True)
    once = [x.grad.clone(), linear.lora.up.weight.grad.clone(), linear.lora.down.weight.grad.clone()]
    loss.backward()
    for first, both in zip(once, (x.grad, linear.lora.up.weight.grad, linear.lora.down.weight.grad), strict=True):
        torch.testing.assert_close(both, 2 * first)


def test_text_projections_need_no_gradient_for_their_input() -> None:
    out = branched()(torch.randn(2, 5, 6))
    assert out.requires_grad
    assert [name for name in _graph(out.grad_fn) if "AddmmBackward" in name or "_Down" in name] == []


def _graph(node: torch.autograd.graph.Node | None) -> list[str]:
    names = [] if node is None else [node.name()]
    return names + [name for child, _ in (node.next_functions if node else ()) for name in _graph(child)]


def test_the_output_may_be_changed_in_place() -> None:
    linear = branched()
    x = torch.randn(2, 5, 6, requires_grad=True)
    ours = torch.autograd.grad(linear(x).mul_(3).sum(), linear.lora.up.weight)[0]
    theirs = torch.autograd.grad(naive(linear, x).mul(3).sum(), linear.lora.up.weight)[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: type) -> None:
    linear = branched()
    x = torch.randn(2, 5, 6)
    with mode():
        torch.testing.assert_close(linear(x), naive(linear, x))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputing_gives_the_same_gradients(dropout: float) -> None:
    linear = branched(dropout=dropout)
    x = torch.randn(2, 5, 6, requires_grad=True)
    torch.manual_seed(7)
    kept = gradients(linear, x, linear(x))
    torch.manual_seed(7)
    recomputed = gradients(linear, x, checkpoint(linear, x, use_reentrant=False))
    for got, wanted in zip(recomputed, kept, strict=True):
        assert torch.equal(got, wanted)


def test_compiles_whole() -> None:
    linear = branched()
    x = torch.randn(2, 5, 6, requires_grad=True)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(gradients(linear, x, compiled(x)), gradients(linear, x, naive(linear, x)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_half_precision_base_computes_in_the_inputs_dtype_and_trains_in_float32() -> None:
    linear = branched()
    linear.weight.data, linear.bias.data = linear.weight.bfloat16(), linear.bias.bfloat16()
    x = torch.randn(2, 5, 6)
    out = linear(x)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert {p.grad.dtype for p in linear.lora.parameters()} == {torch.float32}


def test_autocast() -> None:
    linear = branched()
    x = torch.randn(2, 5, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), naive(linear, x), rtol=0.05, atol=0.05)
    out.float().sum().backward()
    wanted = torch.autograd.grad(naive(linear, x).sum(), [x, *linear.lora.parameters()])
    for got, true in zip([x, *linear.lora.parameters()], wanted, strict=True):
        assert got.grad.dtype == torch.float32
        torch.testing.assert_close(got.grad, true, rtol=0.05, atol=0.2)


def test_shapes_alone() -> None:
    assert branched().to("meta")(torch.empty(2, 5, 6, device="meta")).shape == (2, 5, 9)


def test_dropout_drops_rank_activations_in_training_alone() -> None:
    linear = branched(rank=2, dropout=0.5)
    x = torch.randn(1, 6)
    outs = torch.cat([linear(x) for _ in range(200)])
    assert len(outs.unique(dim=0)) == 4  # either of two ranks on or off
    assert torch.allclose(linear.eval()(x), naive(linear, x))


def test_a_copy_has_branches_of_its_own() -> None:
    linear = branched()
    twin = copy.deepcopy(linear)
    nn.init.zeros_(twin.lora.up.weight)
    x = torch.randn(2, 6)
    torch.testing.assert_close(twin(x), F.linear(x, linear.weight, linear.bias))
    torch.testing.assert_close(linear(x), naive(linear, x))


def test_first_values_depend_on_seed_and_name_alone() -> None:
    state = torch.get_rng_state()
    first = initial_down("blocks.0.self_attn.q", (4, 1000), 42)
    initial_down("blocks.0.self_attn.k", (4, 7), 42)
    assert torch.equal(first, initial_down("blocks.0.self_attn.q", (4, 1000), 42))
    assert not torch.equal(first, initial_down("blocks.0.self_attn.k", (4, 1000), 42))
    assert not torch.equal(first, initial_down("blocks.0.self_attn.q", (4, 1000), 43))
    assert torch.equal(state, torch.get_rng_state())
    bound = 1000**-0.5  # kaiming_uniform with a = sqrt(5)
    assert 0.99 * bound < first.abs().max() <= bound


@pytest.mark.parametrize(("layers", "count"), [(30, 300), (40, 400)])
def test_targets_of_the_published_models(layers: int, count: int) -> None:
    with torch.device("meta"):
        model = Dit(DitConfig(dim=128, ffn_dim=256, num_heads=1, num_layers=layers))
    names = list(targets(model))
    assert len(names) == count
    assert names[:10] == [
        *(f"blocks.0.{part}.{leaf}" for part in ("self_attn", "cross_attn") for leaf in "qkvo"),
        "blocks.0.ffn.0",
        "blocks.0.ffn.2",
    ]


def test_image_projections_are_targets_where_there_are_some(make_model) -> None:
    assert "blocks.1.cross_attn.k_img" in targets(make_model(image=True))
    assert len(targets(make_model(image=True))) == 24


def test_attaching_changes_nothing_but_what_is_trainable(make_model, batch) -> None:
    model = make_model()
    before, names = model(*batch), set(model.state_dict())
    attach(model, NetworkSettings(network_dim=4))
    assert torch.equal(model(*batch), before)
    added = set(model.state_dict()) - names
    assert names < set(model.state_dict())
    assert "blocks.0.self_attn.q.lora.down.weight" in added
    model(*batch).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == added
    assert {n for n, p in model.named_parameters() if p.requires_grad} == added
