import itertools

import pytest
import torch

from tests.parity.golden import relative_error
from tests.unit.models.vae.vaes import WAN21, SmallVae, draw_smooth
from wan_train.errors import InputError
from wan_train.models.settings import VaeSettings
from wan_train.models.vae.tiling import Tiling, blend_tiles, tile_starts, tile_weights
from wan_train.models.vae.vae import WanVAE
from wan_train.sampling.decode import set_up


@pytest.fixture(scope="module")
def small() -> SmallVae:
    return WAN21


@pytest.mark.parametrize("length", [1, 7, 12, 13, 20, 21, 40, 100])
@pytest.mark.parametrize("tiling", [Tiling(12, 0), Tiling(12, 4), Tiling(12, 6), Tiling(12, 11)])
def test_tiles_cover_an_axis_and_share_each_position(length: int, tiling: Tiling) -> None:
    starts = tile_starts(length, tiling)
    size = min(tiling.size, length)
    assert starts[0] == 0 and starts[-1] == max(length - tiling.size, 0)
    assert all(0 < right - left <= size - tiling.overlap for left, right in itertools.pairwise(starts))
    # As few as will do: a tile less would not reach the end.
    assert size + (len(starts) - 2) * (tiling.size - tiling.overlap) < length
    weights = tile_weights(length, starts, tiling.size)
    assert weights.shape == (len(starts), length) and weights.min() >= 0
    torch.testing.assert_close(weights.sum(0), torch.ones(length))
    for start, of_tile in zip(starts, weights, strict=True):
        assert of_tile[:start].sum() == 0 and of_tile[start + tiling.size :].sum() == 0


def test_a_tile_s_weight_is_nought_at_its_inner_edge_and_rises() -> None:
    left, right = tile_weights(20, [0, 8], 12)[:, 8:12]
    torch.testing.assert_close(right, torch.tensor([0.0, 0.25, 0.75, 1.0]))
    torch.testing.assert_close(left, 1 - right)


def test_blending_gives_back_what_every_tile_agrees_on() -> None:
    x = torch.rand(2, 3, 1, 40, 56)
    sizes = []
    blended = blend_tiles(lambda tile: sizes.append(tile.shape[-2:]) or tile, x, Tiling(3, 1), cell=8, out_cell=8)
    torch.testing.assert_close(blended, x)
    assert set(sizes) == {(24, 24)} and len(sizes) == 2 * 3
    small = blend_tiles(lambda tile: tile[..., ::8, ::8], x, Tiling(3, 1), cell=8, out_cell=1)
    torch.testing.assert_close(small, x[..., ::8, ::8])


def test_a_tile_as_large_as_the_image_changes_nothing(vae: WanVAE) -> None:
    pixels = draw_smooth(5, 48, 64)
    latents = vae.encode(pixels)
    decoded = vae.decode(latents)
    vae.tiling = Tiling(8, 2)
    assert torch.equal(vae.encode(pixels), latents)
    assert torch.equal(vae.decode(latents), decoded)


def test_clips_of_a_batch_do_not_mix_in_tiles(vae: WanVAE) -> None:
    vae.tiling = Tiling(6, 2)
    pixels = torch.cat([draw_smooth(5, 48, 64), -draw_smooth(5, 48, 64)])
    latents = vae.encode(pixels)
    assert relative_error(latents[1:], vae.encode(pixels[1:])) < 1e-5
    assert relative_error(vae.decode(latents)[1:], vae.decode(latents[1:])) < 1e-5


def test_settings_reach_the_vae(vae: WanVAE) -> None:
    assert set_up(vae, VaeSettings(vae_tile_size=20)).tiling is None
    settings = VaeSettings(vae_tiling=True, vae_tile_size=20, vae_tile_overlap=6, vae_cache_cpu=True)
    assert set_up(vae, settings).tiling == Tiling(20, 6) and vae.cache_on_cpu
    set_up(vae, VaeSettings())
    assert vae.tiling is None and not vae.cache_on_cpu


def test_an_overlap_that_leaves_nothing_of_a_tile_is_refused() -> None:
    with pytest.raises(InputError, match=r"--vae_tile_overlap 8 .*--vae_tile_size 8"):
        VaeSettings(vae_tile_size=8)
