"""How long the learnt changes are, and limiting them."""

import pytest
import torch

from networks.adapter import create
from networks.deltas.lora import LoraBranch
from networks.norms import by_shape, delta_norms, limit_norms
from networks.settings import NetworkSettings
from wan_train.errors import InputError


def branches() -> list[LoraBranch]:
    """Of various shapes, twice each, some with a rank above what its matrix can have."""
    torch.manual_seed(0)
    return [
        LoraBranch(torch.randn(rank, inputs), torch.randn(outputs, rank), scale=scale)
        for rank, inputs, outputs, scale in ((3, 8, 12, 0.5), (16, 8, 8, -2.0), (3, 8, 12, 1.5), (4, 40, 30, 0.1))
    ]


def product_norm(branch: LoraBranch) -> float:
    up, down = branch.up.weight.detach().double(), branch.down.weight.detach().double()
    return float((branch.scale * up @ down).norm())


def test_norms_are_those_of_the_products() -> None:
    groups = by_shape(branches())
    wanted = [product_norm(branch) for group in groups for branch in group]
    assert delta_norms(groups).tolist() == pytest.approx(wanted, rel=1e-5)
    assert [len(group) for group in groups] == [2, 1, 1]


def test_changes_that_are_too_long_are_shrunk_and_no_others() -> None:
    group = by_shape(branches())
    every = [branch for some in group for branch in some]
    before = [product_norm(branch) for branch in every]
    products = [branch.up.weight @ branch.down.weight for branch in every]
    kept = [branch.up.weight.clone() for branch in every]
    limit = sorted(before)[1] * 1.01
    norms = limit_norms(group, limit)
    assert norms.num_scaled == 2
    assert norms.maximum == pytest.approx(limit)
    assert norms.mean == pytest.approx(sum(min(norm, limit) for norm in before) / 4, rel=1e-5)
    for branch, was, product, up in zip(every, before, products, kept, strict=True):
        assert product_norm(branch) == pytest.approx(min(was, limit), rel=1e-5)
        torch.testing.assert_close(branch.up.weight @ branch.down.weight, product * min(1, limit / was))
        assert torch.equal(branch.up.weight, up) is (was <= limit)


def test_the_adapters_norm_and_limit(make_model) -> None:
    model = make_model()
    adapter = create(model, NetworkSettings(network_dim=2, network_alpha=3.0))
    assert adapter.norm() == 0
    for _, parameter in adapter.named_parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    wanted = sum(product_norm(branch) ** 2 for branch in adapter.branches.values()) ** 0.5
    assert adapter.norm() == pytest.approx(wanted, rel=1e-5)
    report = adapter.scale_norms(0.5)
    assert report.num_scaled == 20 and report.maximum == 0.5
    kept = [parameter.clone() for _, parameter in adapter.named_parameters()]
    assert adapter.scale_norms(0.5).num_scaled == 0
    assert all(torch.equal(was, now) for was, (_, now) in zip(kept, adapter.named_parameters(), strict=True))
    assert adapter.norm() == pytest.approx((20 * 0.25) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("inf"), float("nan")])
def test_limits_that_cannot_be(limit: float) -> None:
    with pytest.raises(InputError, match="--scale_weight_norms"):
        NetworkSettings(scale_weight_norms=limit)


def test_lora_plus_gives_the_ups_a_rate_of_their_own(make_model) -> None:
    adapter = create(make_model(), NetworkSettings(network_args=("loraplus_lr_ratio=16",)))
    downs, ups = adapter.parameter_groups(1e-4)
    assert (downs["lr"], ups["lr"]) == (1e-4, pytest.approx(1.6e-3))
    names = {id(parameter): name for name, parameter in adapter.named_parameters()}
    assert all(".lora.down." in names[id(parameter)] for parameter in downs["params"])
    assert all(".lora.up." in names[id(parameter)] for parameter in ups["params"])
    assert len(downs["params"]) == len(ups["params"]) == 20
