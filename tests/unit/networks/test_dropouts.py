"""What is left out of a pair while it trains, and that gradients are those of what was left."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from networks.adapter import create
from networks.deltas.branch import attach_branch
from networks.deltas.lora import Dropouts, LoraBranch, drop
from networks.settings import NetworkSettings
from wan_train.precision import Linear

SCALE = 0.37
KINDS = [Dropouts(neuron=0.5), Dropouts(rank=0.5), Dropouts(module=0.5), Dropouts(0.3, 0.4, 0.3)]


def branched(dropouts: Dropouts, *, rank: int = 4) -> Linear:
    torch.manual_seed(3)
    linear = Linear(6, 9).requires_grad_(False)
    shares = {"dropout": dropouts.neuron, "rank_dropout": dropouts.rank, "module_dropout": dropouts.module}
    attach_branch(linear, LoraBranch(torch.randn(rank, 6), torch.randn(9, rank), scale=SCALE, **shares))
    return linear.double()


def gradients(out: Tensor, linear: Linear, x: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return list(torch.autograd.grad((out * weights).sum(), [linear.lora.down.weight, linear.lora.up.weight, x]))


def test_a_rank_is_left_out_of_a_sample_as_a_whole() -> None:
    torch.manual_seed(0)
    factors = drop(torch.ones(500, 3, 2, 8), Dropouts(rank=0.25))
    assert torch.equal(factors, factors[:, :1, :1].expand_as(factors))
    assert factors.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert float((factors == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert len(factors[:, 0, 0].unique(dim=0)) > 100  # each sample draws for itself


def test_a_rank_of_inputs_without_tokens() -> None:
    assert drop(torch.ones(5, 8), Dropouts(rank=0.5)).shape == (5, 8)


def test_a_module_is_left_out_of_a_batch_as_a_whole_and_not_made_up_for() -> None:
    torch.manual_seed(0)
    factors = torch.stack([drop(torch.ones(2, 3, 4), Dropouts(module=0.3)) for _ in range(1000)]).flatten(1)
    assert torch.equal(factors, factors[:, :1].expand_as(factors))
    assert factors.unique().tolist() == [0.0, 1.0]
    assert float((factors == 0).float().mean()) == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("dropouts", KINDS)
def test_output_and_gradients_are_those_of_the_formula(dropouts: Dropouts) -> None:
    linear = branched(dropouts)
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    down, up = linear.lora.down.weight, linear.lora.up.weight
    for seed in range(4):
        torch.manual_seed(seed)
        out = linear(x)
        torch.manual_seed(seed)
        kept = drop(torch.ones(3, 5, 4, dtype=torch.float64), dropouts)
        hidden = (x @ down.T) * kept
        torch.testing.assert_close(out, F.linear(x, linear.weight, linear.bias) + SCALE * hidden @ up.T)
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        of_hidden = SCALE * (grad @ up) * kept
        wanted = [
            torch.einsum("blr,bli->ri", of_hidden, x),
            SCALE * torch.einsum("blo,blr->or", grad, hidden),
            grad @ linear.weight + of_hidden @ down,
        ]
        for got, true in zip(gradients(out, linear, x), wanted, strict=True):
            torch.testing.assert_close(got, true, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dropouts", KINDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputing_leaves_out_the_same(dropouts: Dropouts, compiled: bool) -> None:
    linear = branched(dropouts)
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    function = torch.compile(linear, backend="aot_eager", fullgraph=True) if compiled else linear
    torch.manual_seed(7)
    kept = gradients(linear(x), linear, x)
    torch.manual_seed(7)
    recomputed = gradients(checkpoint(function, x, use_reentrant=False), linear, x)
    for got, wanted in zip(recomputed, kept, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dropouts", KINDS)
def test_nothing_is_left_out_or_drawn_outside_of_training(dropouts: Dropouts) -> None:
    linear, plain = branched(dropouts).eval(), branched(Dropouts())
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    state = torch.get_rng_state()
    assert torch.equal(linear(x), plain(x))
    assert torch.equal(state, torch.get_rng_state())


def test_every_parameter_has_a_gradient_whatever_is_left_out(make_model, batch) -> None:
    model = make_model()
    arguments = ("module_dropout=0.9", "rank_dropout=0.9")
    adapter = create(model, NetworkSettings(network_dim=2, network_args=arguments))
    for seed in range(3):
        torch.manual_seed(seed)
        model(*batch).square().sum().backward()
        assert all(parameter.grad is not None for _, parameter in adapter.named_parameters())
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("settings", "ranks_differ", "samples_differ"),
    [
        (NetworkSettings(network_dim=64, network_args=("rank_dropout=0.5",)), True, True),
        (NetworkSettings(network_dim=64, network_args=("module_dropout=0.5",)), False, False),
        (NetworkSettings(network_dim=64, network_dropout=0.5), True, True),
    ],
)
def test_options_reach_the_branches(make_model, settings, ranks_differ: bool, samples_differ: bool) -> None:
    model = make_model()
    adapter = create(model, settings)
    linear = model.blocks[0].ffn[0]
    for name, parameter in adapter.named_parameters():
        if name.startswith("blocks.0.ffn.0"):
            parameter.data = torch.ones_like(parameter)
    x = torch.ones(2, 1, 8)
    torch.manual_seed(0)
    changes = torch.stack([linear(x) - F.linear(x, linear.weight, linear.bias) for _ in range(20)])
    assert (len(changes[:, 0, 0, 0].round(decimals=2).unique()) > 2) is ranks_differ  # more than all or nothing
    assert (not torch.allclose(changes[:, 0], changes[:, 1])) is samples_differ
