"""AdamW with states of 8 bits."""

from typing import Any

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from bitsandbytes.optim import AdamW8bit
from torch import Tensor, nn

from wan_train.training.optimizing.adamw8bit import AdamW8bitSR, code_table, decode, encode
from wan_train.training.optimizing.optimizer_state import load_portable_state, portable_state
from wan_train.training.optimizing.optimizers import make_optimizer
from wan_train.training.settings import OptimizerSettings


def descend(optimizer: Any, weights: list[nn.Parameter], steps: range) -> None:
    """Towards a target for each weight, along noisy slopes of very unlike sizes."""
    for step in steps:
        for place, weight in enumerate(weights):
            draw = torch.Generator().manual_seed(1000 * step + place)
            sizes = torch.logspace(-4, 0, weight.numel()).view_as(weight)
            weight.grad = sizes * (weight.detach() - 1 + 0.3 * torch.randn(weight.shape, generator=draw))
        optimizer.step()


def some() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((96, 100), (8, 3, 16, 16), (100,))]


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_is_that_of_bitsandbytes(signed: bool) -> None:
    torch.testing.assert_close(code_table(signed=signed), create_dynamic_map(signed=signed).cpu(), rtol=0, atol=1e-7)
    assert len(code_table(signed=signed)) == 256


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [1, 255, 256, 1000])
def test_codes_are_the_nearest_of_the_table(signed: bool, count: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    x = x if signed else x.square()
    codes, scales = encode(x, signed=signed)
    assert codes.dtype == torch.uint8 and codes.shape == (count,) and scales.shape == (-(-count // 256),)
    within = x / scales.repeat_interleave(256)[:count]
    nearest = (within.unsqueeze(1) - code_table(signed=signed)).abs().amin(1)
    found = decode(codes, scales, signed=signed) / scales.repeat_interleave(256)[:count]
    torch.testing.assert_close((found - within).abs(), nearest, rtol=0, atol=1e-6)


def test_zeros_stay_zeros() -> None:
    codes, scales = encode(torch.zeros(300), signed=True)
    assert torch.equal(decode(codes, scales, signed=True), torch.zeros(300))


@pytest.mark.parametrize(("theirs", "apart"), [(torch.optim.AdamW, 0.04), (AdamW8bit, 0.005)], ids=["torch", "bnb"])
def test_it_goes_where_adamw_goes_and_where_bitsandbytes_does(theirs: Any, apart: float) -> None:
    ours, others = some(), some()
    descend(AdamW8bitSR(ours, lr=1e-2, weight_decay=0.1), ours, range(200))
    descend(theirs(others, lr=1e-2, weight_decay=0.1), others, range(200))
    with torch.no_grad():
        for found, wanted, start in zip(ours, others, some(), strict=True):
            assert float((found - wanted).norm() / (wanted - start).norm()) < apart
    torch.testing.assert_close(ours[2], others[2], rtol=1e-5, atol=1e-6)  # small: in float32


def test_a_state_takes_a_byte_for_each_number_and_four_for_256() -> None:
    weight = nn.Parameter(torch.randn(64, 100))
    optimizer = AdamW8bitSR([weight])
    descend(optimizer, [weight], range(1))
    tensors = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == 2 * (6400 + 4 * 25)


def test_pieces_of_a_long_weight_step_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = some(), some()
    descend(AdamW8bitSR(whole), whole, range(3))
    monkeypatch.setattr("wan_train.training.optimizing.adamw8bit._AT_ONCE", 512)
    descend(AdamW8bitSR(pieces), pieces, range(3))
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_it_goes_on_to_the_bit() -> None:
    settings = OptimizerSettings(optimizer_type="AdamW8bitSR", learning_rate=1e-2)
    whole, parts = some(), some()
    descend(make_optimizer([{"params": whole, "lr": 1e-2}], settings), whole, range(6))
    first = make_optimizer([{"params": parts, "lr": 1e-2}], settings)
    descend(first, parts, range(3))
    second = make_optimizer([{"params": parts, "lr": 1e-2}], settings)
    load_portable_state(second, portable_state(first))
    descend(second, parts, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("arguments", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"weight_decay": -1.0}])
def test_what_is_out_of_range_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="0 or more"):
        AdamW8bitSR(some(), **arguments)
