"""Merging into a stream of weights, against the branches that do the same at run time."""

import pytest
import torch

from networks.adapter import create
from networks.deltas.lora import LoraDelta
from networks.formats.files import kohya_state
from networks.merge import merged
from networks.settings import NetworkSettings
from wan_train.errors import InputError


def test_merged_and_attached_compute_the_same(make_model, make_deltas, batch) -> None:
    attached, plain = make_model(image=True), make_model(image=True)
    deltas = make_deltas(plain, rank=3, alpha=2.0)
    create(attached, NetworkSettings(network_dim=3, network_alpha=2.0)).load(kohya_state(deltas))
    untouched = plain(*batch)
    plain.load_state_dict(dict(merged(plain.state_dict().items(), [(deltas, 1.0)])))
    torch.testing.assert_close(attached(*batch), plain(*batch), rtol=0, atol=1e-5)
    assert (untouched - plain(*batch)).abs().max() > 1e-2


def test_the_sum_of_several_with_their_multipliers(make_model, make_deltas) -> None:
    state = make_model().state_dict()
    first, second = make_deltas(make_model(), rank=3), make_deltas(make_model(), rank=5, seed=1)
    del second["blocks.1.ffn.0"]
    result = dict(merged(state.items(), [(first, 0.7), (second, -1.2)]))
    for name, weight in state.items():
        wanted = weight.double()
        for deltas, multiplier in ((first, 0.7), (second, -1.2)):
            if delta := deltas.get(name.removesuffix(".weight")) if name.endswith(".weight") else None:
                wanted = wanted + multiplier * delta.scale * (delta.up.double() @ delta.down.double())
        torch.testing.assert_close(result[name].double(), wanted, rtol=0, atol=1e-6)
    assert torch.equal(result["head.head.weight"], state["head.head.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, delta = torch.randn(6, 4).to(dtype), LoraDelta(torch.randn(2, 4).half(), torch.randn(6, 2).half(), 0.3)
    ((_, result),) = merged([("a.weight", weight)], [({"a": delta}, 1.0), ({"a": delta}, 1.0)])
    wanted = (weight.double() + 0.6 * delta.up.double() @ delta.down.double()).float()
    assert result.dtype == dtype
    assert torch.equal(result.float(), wanted.to(dtype).float())


def test_the_source_is_read_lazily_and_left_as_it_is(make_model, make_deltas) -> None:
    state, taken = make_model().state_dict(), []

    def reading():
        for name, tensor in state.items():
            taken.append(name)
            yield name, tensor

    before = {name: tensor.clone() for name, tensor in state.items()}
    stream = merged(reading(), [(make_deltas(make_model()), 1.0)])
    assert not taken
    next(stream)
    assert len(taken) == 1
    list(stream)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_a_bias_is_not_mistaken_for_its_module() -> None:
    delta = LoraDelta(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    result = dict(merged([("a.bias", torch.zeros(2)), ("a.weight", torch.zeros(2, 2))], [({"a": delta}, 1.0)]))
    assert torch.equal(result["a.bias"], torch.zeros(2)) and torch.equal(result["a.weight"], torch.ones(2, 2))


def test_misfits_and_leftovers_are_refused(make_model, make_deltas) -> None:
    state = make_model().state_dict()
    with pytest.raises(InputError, match="16 x 16, but this model's is 8 x 8"):
        list(merged(state.items(), [(make_deltas(make_model(dim=16)), 1.0)]))
    with pytest.raises(InputError, match=r"4 of its modules are not in this one.*k_img"):
        list(merged(state.items(), [(make_deltas(make_model(image=True)), 1.0)]))
