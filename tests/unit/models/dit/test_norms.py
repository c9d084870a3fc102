import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wan_train.models.dit.norms import LayerNorm, RMSNorm
from wan_train.models.dit.rope import rope_table


def plain(x: Tensor, norm: RMSNorm, rope: Tensor | None) -> Tensor:
    """The same from complex numbers and torch's own norm."""
    heads = F.rms_norm(x, (24,), norm.weight.to(x.dtype), norm.eps).unflatten(-1, (2, 12))
    if rope is None:
        return heads
    turn = torch.complex(rope[0, ..., 0::2], rope[1, ..., 1::2]).to(torch.complex128)
    return torch.view_as_real(torch.view_as_complex(heads.unflatten(-1, (-1, 2))) * turn).flatten(-2)


@pytest.mark.parametrize("turned", [False, True])
def test_norm_and_rotation_equal_the_plain_form_with_gradients(turned: bool) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(24, 1e-6)
    torch.nn.init.normal_(norm.weight)
    rope = rope_table((2, 2, 3), 12, device=torch.device("cpu")) if turned else None
    x, target = torch.randn(2, 12, 24, requires_grad=True), torch.randn(2, 12, 2, 12)
    out = norm(x, 2, rope)
    (out * target).sum().backward()
    wide = x.detach().double().requires_grad_()
    twin = RMSNorm(24, 1e-6).double()
    twin.weight.data.copy_(norm.weight.data)
    expected = plain(wide, twin, rope)
    (expected * target).sum().backward()
    assert x.grad is not None and wide.grad is not None
    assert norm.weight.grad is not None and twin.weight.grad is not None
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), wide.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norm.weight.grad.double(), twin.weight.grad, atol=1e-4, rtol=1e-4)


def test_half_precision_goes_in_and_out_with_float32_between() -> None:
    torch.manual_seed(0)
    norm, x = RMSNorm(24, 1e-6), 300 * torch.randn(1, 4, 24)
    out = norm(x.half(), 2)
    assert out.dtype is torch.float16
    torch.testing.assert_close(out.float(), norm(x.half().float(), 2), atol=2e-3, rtol=2e-3)


def test_layer_norm_returns_float32_whatever_comes_in() -> None:
    norm = LayerNorm(24)
    x = torch.randn(3, 24).bfloat16()
    assert norm(x).dtype is torch.float32
    torch.testing.assert_close(norm.bfloat16()(x), F.layer_norm(x.float(), (24,)))
