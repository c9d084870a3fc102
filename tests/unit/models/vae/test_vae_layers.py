import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_train.models.vae.layers import (
    AttentionBlock,
    CausalConv3d,
    Downsample,
    FeatureCache,
    RMSNorm,
    Upsample,
    convolve_doubled,
)

LAYOUTS = (torch.contiguous_format, torch.channels_last_3d)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def stream(layer: nn.Module, x: Tensor, *sizes: int) -> Tensor:
    cache = FeatureCache()
    return torch.cat([layer(chunk, cache) for chunk in x.split(sizes, dim=2)], dim=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(7,), (1, 6), (1, 1, 1, 4), (2, 1, 4)])
def test_a_causal_convolution_streams(sizes: tuple[int, ...], layout: torch.memory_format) -> None:
    layer = CausalConv3d(3, 5)
    x = torch.randn(2, 3, 7, 6, 4).contiguous(memory_format=layout)
    whole = F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), layer.weight, layer.bias)
    assert torch.allclose(stream(layer, x, *sizes), whole, atol=1e-5)


def test_the_norm_divides_by_the_root_mean_square() -> None:
    norm = RMSNorm(6)
    norm.gamma.copy_(torch.randn(6, 1, 1, 1))
    x = torch.randn(2, 6, 3, 4, 5)
    expected = x / x.pow(2).mean(dim=1, keepdim=True).sqrt() * norm.gamma
    assert torch.allclose(norm(x), expected, atol=1e-6)
    assert torch.equal(norm(torch.zeros_like(x)), torch.zeros_like(x))


@pytest.mark.parametrize("size", [(4, 6), (1, 1), (3, 5)])
def test_doubling_and_convolving_is_one_step(size: tuple[int, int]) -> None:
    x, weight, bias = torch.randn(2, 3, *size), torch.randn(5, 3, 3, 3), torch.randn(5)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest-exact"), weight, bias, padding=1)
    assert torch.allclose(convolve_doubled(x, weight, bias), expected, atol=1e-4)


def test_attention_stays_within_a_frame() -> None:
    layer = AttentionBlock(4)
    x = torch.randn(1, 4, 3, 2, 2)
    changed = x.clone()
    changed[:, :, 1] += 1
    difference = (layer(x, FeatureCache()) - layer(changed, FeatureCache())).abs().amax(dim=(0, 1, 3, 4))
    assert difference[1] > 0
    assert difference[0] == difference[2] == 0


def test_time_halves_after_the_first_frame_and_doubles_again() -> None:
    x = torch.randn(1, 4, 9, 4, 6)
    down, up = Downsample(4, temporal=True), Upsample(4, 2, temporal=True)
    small = stream(down, x, 1, 4, 4)
    assert small.shape == (1, 4, 5, 2, 3)
    assert torch.allclose(small, stream(down, x, 1, 2, 2, 4), atol=1e-5)
    large = stream(up, small, 1, 1, 3)
    assert large.shape == (1, 2, 9, 4, 6)
    assert torch.allclose(large, stream(up, small, 1, 4), atol=1e-5)


def test_the_cache_holds_copies() -> None:
    cache, layer, x = FeatureCache(), nn.Identity(), torch.zeros(1, 1, 4, 2, 2)
    assert cache.last(layer, x.device) is None
    cache.keep(layer, x[:, :, -2:])
    x.fill_(1)
    kept = cache.last(layer, x.device)
    assert kept is not None and kept.abs().max() == 0
    assert kept.untyped_storage().nbytes() == kept.nbytes
    assert cache.starts(layer) and not cache.starts(layer)
