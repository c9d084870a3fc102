"""The model as its own teacher, its adapter switched off."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from networks.adapter import create
from networks.settings import NetworkSettings
from wan_train.compile import apply_compile
from wan_train.placement.settings import CompileSettings


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with (
        torch._dynamo.config.patch(optimize_ddp=torch._dynamo.config.optimize_ddp),
        torch._functorch.config.patch(
            ban_recompute_materialized_backward=torch._functorch.config.ban_recompute_materialized_backward
        ),
    ):
        yield
    torch._dynamo.reset()


def trained(model, **settings):
    adapter = create(model, NetworkSettings(network_dim=3, **settings))
    for _, parameter in adapter.named_parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(5))
    return adapter


@pytest.mark.parametrize("autocast", [False, True])
def test_the_model_computes_as_without_its_adapter(make_model, batch, autocast: bool) -> None:
    model, plain = make_model(), make_model()
    adapter = trained(model, network_args=("module_dropout=0.5", "rank_dropout=0.5"), network_dropout=0.5)
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with adapter.disabled():
            assert torch.equal(model(*batch), plain(*batch))
        assert torch.equal(state, torch.get_rng_state())
        assert not torch.equal(model(*batch), plain(*batch))


def test_nested_and_left_by_an_error(make_model, batch) -> None:
    model, plain = make_model(), make_model()
    adapter = trained(model)
    learnt = model(*batch)
    with pytest.raises(KeyError), adapter.disabled():
        with adapter.disabled():
            pass
        assert torch.equal(model(*batch), plain(*batch))
        raise KeyError
    assert torch.equal(model(*batch), learnt)


def test_a_teachers_pass_within_a_step_leaves_its_gradients_alone(make_model, batch) -> None:
    model, twin = make_model(), make_model()
    adapter, other = trained(model), trained(twin)
    model_out = model(*batch)
    with adapter.disabled(), torch.no_grad():
        model(*batch)
    model_out.square().sum().backward()
    twin(*batch).square().sum().backward()
    for (_, ours), (_, theirs) in zip(adapter.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_switching_compiles_one_graph_more_and_then_none(make_model, batch, fresh_compiler) -> None:
    model, plain = make_model(), make_model()
    adapter = trained(model, network_args=("module_dropout=0.5", "rank_dropout=0.5"))
    settings = CompileSettings(compile=True, compile_backend="eager", compile_fullgraph=True)
    apply_compile(model.blocks, settings, tokens=((0, 1),))

    def step() -> int:
        model(*batch).square().sum().backward()
        return int(counters["stats"]["unique_graphs"])

    graphs = step()
    assert step() == graphs
    for _ in range(3):
        with adapter.disabled(), torch.no_grad():
            assert torch.allclose(model(*batch), plain(*batch), atol=1e-6)
        assert step() == graphs + 1
