import pytest
import torch
from torch import nn

from wan_train.cli import InputError
from wan_train.precision import Linear, compute_dtype, default_device, dtype_of, name_of


def test_names_both_ways() -> None:
    assert dtype_of("bf16") is dtype_of("bfloat16") is torch.bfloat16
    assert name_of(torch.bfloat16) == "bfloat16"
    with pytest.raises(InputError, match="bf16"):
        dtype_of("bf17")


def test_a_cpu_computes_in_float32_and_an_accelerator_as_stored() -> None:
    assert compute_dtype("cpu", torch.bfloat16) is torch.float32
    assert compute_dtype("cuda", torch.bfloat16) is torch.bfloat16


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
