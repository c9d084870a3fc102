"""Matrices in 8 bits: their errors, their products, their gradients."""

import time

import pytest
import torch
from torch import Tensor, nn

from wan_train.precision import Linear, widened
from wan_train.quantization.schemes import (
    FP8,
    SCHEMES,
    Fp8Linear,
    Int8Linear,
    cast_fp8,
    check_fp8_product,
    install,
    quantise_blocks,
    quantise_int8,
    quantise_rows,
    quantised,
    scale_shape,
)


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def restored(codes) -> Tensor:
    return widened(codes.weight, codes.scale, torch.float32)


@pytest.mark.parametrize(
    ("quantise", "largest"),
    [(cast_fp8, 0.035), (quantise_blocks, 0.0225), (quantise_rows, 0.027), (quantise_int8, 0.01)],
)
def test_error_of_a_matrix(quantise, largest) -> None:
    weight = matrix(96, 256)
    assert 0.5 * largest < error(restored(quantise(weight)), weight) < largest


def test_scales_are_float32_and_of_64_inputs() -> None:
    codes = quantise_blocks(matrix(8, 192))
    assert codes.weight.dtype is FP8 and codes.scale.dtype is torch.float32
    assert codes.scale.shape == (8, 3, 1)
    assert quantise_blocks(matrix(8, 96)).scale.shape == (8, 1, 1)


def test_outlier_costs_its_own_group_only() -> None:
    weight = matrix(4, 256)
    spoiled = weight.clone()
    spoiled[0, 3] = 900.0
    before, after = restored(quantise_blocks(weight)), restored(quantise_blocks(spoiled))
    assert torch.equal(before[:, 64:], after[:, 64:]) and torch.equal(before[1:], after[1:])
    assert abs(float(after[0, 3]) - 900.0) < 900 * 0.07


def test_blocks_beat_the_largest_magnitude_rule() -> None:
    weight = matrix(64, 512)
    groups = weight.unflatten(1, (8, 64))
    scale = groups.abs().amax(-1, keepdim=True) / 448
    plain = ((groups / scale).to(FP8).float() * scale).flatten(1)
    assert error(restored(quantise_blocks(weight)), weight) < 0.92 * error(plain, weight)


def test_zeros_nan_and_huge_numbers() -> None:
    weight = torch.zeros(2, 64)
    weight[0, 0], weight[0, 1], weight[1, 0] = float("nan"), 1.0, 1e30
    for quantise in (cast_fp8, quantise_blocks, quantise_int8):
        codes = quantise(weight)
        assert torch.isfinite(restored(codes)).all()
        assert restored(codes)[0, 0] == 0
    assert restored(cast_fp8(weight))[1, 0] == 448
    assert not restored(quantise_blocks(torch.zeros(2, 64))).any()


def test_widening_in_pieces_is_the_same(monkeypatch) -> None:
    codes = quantise_blocks(matrix(70, 128))
    whole = widened(codes.weight, codes.scale, torch.bfloat16)
    monkeypatch.setattr("wan_train.precision._CHUNK", 1000)
    assert torch.equal(widened(codes.weight, codes.scale, torch.bfloat16), whole)


def loaded(scheme: str, weight: Tensor, bias: Tensor | None = None) -> Linear:
    """A Linear that a checkpoint was quantised into."""
    rows, columns = weight.shape
    with torch.device("meta"):
        model = nn.Sequential(Linear(columns, rows, bias=bias is not None))
    chosen = SCHEMES[scheme]
    shape = scale_shape(chosen, (rows, columns))
    install(model, {"0": chosen.linear}, {} if shape is None else {"0": shape})
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = dict(quantised(iter({"0.weight": weight}.items()), {"0": chosen}, "cpu"))
    if bias is not None:
        tensors["0.bias"] = bias
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    linear = model[0]
    linear.weight = nn.Parameter(tensors["0.weight"], requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    if shape is not None:
        linear.scale_weight = tensors["0.scale_weight"]
    return linear


@pytest.mark.parametrize(
    ("scheme", "largest"), [("fp8", 0.04), ("fp8_scaled", 0.03), ("fp8_fast", 0.045), ("int8", 0.015)]
)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (1, 64)])
def test_product_and_gradient(scheme, largest, shape) -> None:
    weight, bias = matrix(48, 64), matrix(1, 48, seed=2)[0]
    linear = loaded(scheme, weight, bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = linear(x)
    assert y.shape == (*shape[:-1], 48) and y.dtype is torch.float32
    assert error(y.detach(), nn.functional.linear(x.detach(), weight, bias)) < largest
    y.square().sum().backward()
    stored = widened(linear.weight, linear.scale_weight, torch.float32)
    assert error(x.grad, 2 * y.detach() @ stored) < 1e-6  # exact for the stored matrix


@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_precision_inputs_and_state_dict(scheme) -> None:
    linear = loaded(scheme, matrix(48, 64))
    x = torch.randn(7, 64)
    assert linear(x.bfloat16()).dtype is torch.bfloat16
    assert error(linear(x.bfloat16()).float(), linear(x)) < 0.03
    assert linear.state_dict()["weight"].dtype.itemsize == 1


def test_products_in_eight_bits_keep_what_few_tokens_are() -> None:
    """Each token has its own scale: a loud one does not cost the quiet ones their precision."""
    weight = matrix(48, 64)
    quiet = torch.randn(4, 64)
    loud = torch.cat([quiet, torch.full((1, 64), 1e4)])
    for scheme, kind in (("int8", Int8Linear), ("fp8_fast", Fp8Linear)):
        linear = loaded(scheme, weight)
        assert type(linear) is kind
        assert torch.equal(linear(loud)[:4], linear(quiet))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", [1, 16, 17, 200])
def test_an_accelerator_multiplies_as_a_cpu_does(scheme, tokens) -> None:
    if scheme == "fp8_fast" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device has no fp8 product")
    here = loaded(scheme, matrix(48, 64), matrix(1, 48, seed=2)[0])
    x = torch.randn(1, tokens, 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        there = loaded(scheme, matrix(48, 64), matrix(1, 48, seed=2)[0]).cuda()
        far = x.to("cuda", dtype).requires_grad_()
        y = there(far)
        assert y.dtype is dtype and error(y.detach().cpu().float(), here(x)) < 0.04
        y.float().sum().backward()
        near = x.clone().requires_grad_()
        here(near).sum().backward()
        assert error(far.grad.cpu().float(), near.grad) < 0.04


def test_shapes_of_scales_cost_no_quantising() -> None:
    """A start asks for those of hundreds of matrices: going through the arithmetic took minutes in the 14B model."""
    started = time.perf_counter()
    assert [scale_shape(SCHEMES[name], (13824, 5120)) for name in ("fp8", "fp8_scaled", "fp8_fast", "int8")] == [
        None,
        (13824, 80, 1),
        (13824, 1, 1),
        (13824, 1, 1),
    ]
    assert time.perf_counter() - started < 0.2


def test_fp8_product_is_tried() -> None:
    check_fp8_product(torch.device("cpu"))


def test_fp8_product_refused_where_there_is_none(monkeypatch) -> None:
    def absent(*_, **__):
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9")

    monkeypatch.setattr(torch, "_scaled_mm", absent)
    with pytest.raises(ValueError, match=r"--fp8_fast: cpu does not support fp8 matrix products .*omit the option"):
        check_fp8_product(torch.device("cpu"))
