"""A block that is recomputed does not take the product whose result nothing has saved."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from networks.adapter import create
from networks.settings import NetworkSettings
from wan_train.models.dit.dit import Dit, DitConfig
from wan_train.placement.recompute import apply_recompute
from wan_train.placement.settings import RecomputeSettings
from wan_train.placement.spare import _NoProducts, is_spare
from wan_train.quantization.schemes import SCHEMES

CPU = torch.device("cpu")


class Products(TorchDispatchMode):
    """Counts the products with a matrix of this shape."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in ("aten::mm", "aten::addmm", "aten::_int_mm"):
            right = args[2] if "addmm" in func.name() else args[1]
            self.count += tuple(right.shape) == self.shape
        return func(*args, **(kwargs or {}))


def make_model(scheme: str = "") -> Dit:
    torch.manual_seed(0)
    model = Dit(DitConfig(dim=32, ffn_dim=80, num_heads=2, num_layers=2, text_dim=16)).requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    if scheme:
        for block in model.blocks:
            last = block.ffn[2]
            codes = SCHEMES[scheme].quantise(last.weight.detach())
            last.__class__ = SCHEMES[scheme].linear
            last.weight = nn.Parameter(codes.weight, requires_grad=False)
            last.scale_weight = codes.scale
    create(model, NetworkSettings(network_dim=4, network_alpha=4))
    for name, parameter in model.named_parameters():
        if "lora.up" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model: Dit) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    latents, text = (torch.randn(shape, generator=generator) for shape in ((1, 16, 2, 8, 8), (1, 512, 16)))
    loss = model(latents, torch.tensor([300.0]), text).square().mean()
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("mode", ["full", "keep_attention"])
@pytest.mark.parametrize("scheme", ["", "fp8", "fp8_scaled", "int8", "fp8_fast"])
def test_gradients_are_the_same_to_the_bit(mode: str, scheme: str) -> None:
    plain, spared = make_model(scheme), make_model(scheme)
    apply_recompute(spared.blocks, RecomputeSettings(recompute=mode), CPU)
    (loss, expected), (ours, found) = gradients(plain), gradients(spared)
    assert torch.equal(ours, loss)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(found, expected, strict=True))


def test_the_product_is_taken_once() -> None:
    model = make_model()
    apply_recompute(model.blocks, RecomputeSettings(recompute="full"), CPU)
    with Products((80, 32)) as counted:
        gradients(model)
    # In each of two blocks: the second matrix forward, and the first, of that shape too, backward.
    assert counted.count == 2 * 2


def test_the_dtype_that_a_product_is_asked_for_is_kept() -> None:
    """Operators hand `out_dtype` on by position, whether it is named or not."""
    left, right, scale = torch.ones(16, 32), torch.ones(16, 32).t(), torch.ones(())
    codes = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)
    with _NoProducts():  # type: ignore[no-untyped-call]
        named = torch._scaled_mm(*codes, scale, scale, out_dtype=torch.bfloat16)
        placed = torch.ops.aten._scaled_mm(*codes, scale, scale, None, None, torch.bfloat16)
        plain = torch.ops.aten.mm.dtype(left.bfloat16(), right.bfloat16(), torch.float32)
        default = left.half() @ right.half()
    assert [product.dtype for product in (named, placed)] == [torch.bfloat16] * 2
    assert (plain.dtype, default.dtype) == (torch.float32, torch.float16)
    assert all(product.shape == (16, 16) and product.isnan().all() for product in (named, placed, plain, default))


def test_what_is_trained_itself_takes_it() -> None:
    """The gate's own gradient needs what the feed-forward gave."""
    plain, spared = make_model(), make_model()
    for model in (plain, spared):
        for block in model.blocks:
            block.modulation.requires_grad_(True)
    apply_recompute(spared.blocks, RecomputeSettings(recompute="full"), CPU)
    assert not is_spare(spared.blocks[0], ())
    (_, expected), (_, found) = gradients(plain), gradients(spared)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
