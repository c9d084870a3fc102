import pytest
import torch
from torch import nn

from cache_tools.runner import rank_device
from generate.models import Models
from generate.settings import GenerateSettings
from tests.unit.placement.counting import Meter, nbytes
from wan_train import precision
from wan_train.config_file import from_values
from wan_train.distributed.ranks import Place
from wan_train.errors import InputError
from wan_train.models.dit.dit import Dit, DitConfig
from wan_train.precision import Linear, compute_dtype, default_device, dtype_of, name_of
from wan_train.training.accelerator import make_accelerator
from wan_train.training.settings import LoopSettings, ProcessSettings


def test_names_both_ways() -> None:
    assert dtype_of("bf16") is dtype_of("bfloat16") is torch.bfloat16
    assert name_of(torch.bfloat16) == "bfloat16"
    with pytest.raises(InputError, match="bf16"):
        dtype_of("bf17")


def test_a_cpu_computes_in_float32_and_an_accelerator_as_stored() -> None:
    assert compute_dtype("cpu", torch.bfloat16) is torch.float32
    assert compute_dtype("cuda", torch.bfloat16) is torch.bfloat16


@pytest.mark.parametrize("where", ["trainer", "generator", "caching"])
def test_every_tool_sums_half_precision_products_in_float32(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    try:
        for name in names:
            setattr(matmul, name, True)
        if where == "trainer":
            make_accelerator(LoopSettings(), ProcessSettings())
        elif where == "generator":
            Models(from_values(GenerateSettings, {"task": "t2v-1.3B", "dit": "x"}, "here"), {}, torch.device("cpu"))
        else:
            rank_device("cpu", Place())
        assert [getattr(matmul, name) for name in names] == [False, False]
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)


def test_linear_computes_in_its_inputs_dtype() -> None:
    torch.manual_seed(0)
    layer = Linear(8, 8).to(torch.bfloat16)
    twin = nn.Linear(8, 8)
    twin.load_state_dict({key: value.float() for key, value in layer.state_dict().items()})
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), twin(x))
    assert layer.weight.dtype is torch.bfloat16


def test_a_device_that_is_not_there_is_named() -> None:
    assert default_device("cpu") == torch.device("cpu")
    for name in ("toaster", "meta0", "xpu:7"):
        with pytest.raises(InputError, match=name):
            default_device(name)


def test_a_frozen_half_linear_keeps_no_wide_copy_for_the_backward_pass() -> None:
    torch.manual_seed(0)
    layer = Linear(64, 32).to(torch.bfloat16).requires_grad_(False)
    x, saved = torch.randn(2, 5, 64, requires_grad=True), []

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        out = layer(x)
    assert {tensor.dtype for tensor in saved} == {torch.bfloat16}
    out.sum().backward()
    expected = torch.ones(2, 5, 32) @ layer.weight.float()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


def test_trainable_half_weights_get_their_gradient() -> None:
    layer = Linear(8, 4).to(torch.bfloat16)
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "trained"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True), (torch.float8_e4m3fn, False)],
    ids=str,
)
def test_a_large_matrix_is_widened_a_few_rows_at_a_time_for_a_few_tokens(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, trained: bool
) -> None:
    monkeypatch.setattr(precision, "_CHUNK", 64 * 10)
    torch.manual_seed(0)
    layer, twin = Linear(64, 255), nn.Linear(64, 255)
    layer.weight.data = layer.weight.data.to(dtype)
    layer.bias.data = layer.bias.data.bfloat16()
    layer.requires_grad_(trained)
    twin.load_state_dict({name: value.float() for name, value in layer.named_parameters()})
    x = torch.randn(2, 3, 64, requires_grad=True)
    again = x.detach().requires_grad_()
    with Meter() as meter:
        out = layer(x)
        out.square().sum().backward()
    wanted = twin(again)
    wanted.square().sum().backward()
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(x.grad, again.grad)
    wide = 4 * layer.weight.numel()
    assert meter.peak < wide / 2 + (nbytes(layer.weight) if trained else 0)
    if trained:
        assert layer.weight.grad is not None and layer.bias.grad is not None
        torch.testing.assert_close(layer.weight.grad, twin.weight.grad.to(dtype))  # type: ignore[union-attr]
        torch.testing.assert_close(layer.bias.grad, twin.bias.grad.bfloat16())  # type: ignore[union-attr]


@pytest.mark.parametrize("times", [(1,), (2, 3)], ids=str)
def test_the_time_projection_of_a_model_is_never_wide(monkeypatch: pytest.MonkeyPatch, times: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Dit(DitConfig(dim=256, ffn_dim=64, num_heads=2, num_layers=0, text_dim=16)).requires_grad_(False)
    whole = model.bfloat16().embed_time(torch.full(times, 500.0))
    monkeypatch.setattr(precision, "_CHUNK", 2**13)
    with Meter() as meter:
        found = model.embed_time(torch.full(times, 500.0))
    assert meter.peak < model.time_projection[1].weight.numel()  # a quarter of what it would be in float32
    for ours, theirs in zip(found, whole, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs)
