"""The Wan2.2 VAE: its layers by formula, the model with random weights, and which of the two VAEs a file is."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.parity.golden import load_case, load_manifest, relative_error
from tests.tiny.make import draw_weight, save, vae_shapes
from tests.tiny.vae22 import VAE22, vae22_shapes
from wan_train.errors import InputError
from wan_train.models.vae.coders import fold_patches, unfold_patches
from wan_train.models.vae.geometry import GEOMETRIES, KIND22
from wan_train.models.vae.layers import FeatureCache
from wan_train.models.vae.names import diffusers_name
from wan_train.models.vae.tiling import Tiling
from wan_train.models.vae.vae import WanVAE, check_vae, load_vae
from wan_train.models.vae.wan22 import add_repeated, average_neighbours

WEIGHTS = {name: draw_weight(name, shape) for name, shape in vae22_shapes().items()}


@pytest.fixture(scope="module")
def loaded() -> WanVAE:
    return load_vae(WEIGHTS)


@pytest.fixture
def vae(loaded: WanVAE) -> Iterator[WanVAE]:
    yield loaded
    loaded.tiling, loaded.cache_on_cpu = None, False


def draw_pixels(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def draw_latents(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def draw_smooth(frames: int, height: int, width: int) -> Tensor:
    t, y, x = torch.meshgrid(*(torch.linspace(0, 1, side) for side in (frames, height, width)), indexing="ij")
    colours = torch.sin(6 * x + 2 * y + t), torch.cos(5 * y - 3 * x + 2 * t), torch.sin(4 * x * x + 5 * y - t)
    return 0.8 * torch.stack(colours)[None]


def test_sizes_and_types(vae: WanVAE) -> None:
    assert (vae.latent_channels, vae.stride, vae.frame_stride) == (48, 16, 4)
    latents = vae.encode(draw_pixels(2, 3, 5, 32, 48).double())
    assert latents.shape == (2, 48, 2, 2, 3)
    pixels = vae.decode(latents.bfloat16())
    assert pixels.shape == (2, 3, 5, 32, 48)
    assert latents.dtype is pixels.dtype is torch.float32
    assert not latents.requires_grad and not pixels.requires_grad
    assert pixels.abs().max() <= 1


def test_encoding_streams(vae: WanVAE) -> None:
    """The latents of the first 1 + 4k frames do not depend on what follows."""
    pixels = draw_pixels(1, 3, 13, 32, 32)
    latents = vae.encode(pixels)
    for count in range(1, 4):
        assert torch.equal(vae.encode(pixels[:, :, : 4 * count - 3]), latents[:, :, :count])


def test_decoding_streams(vae: WanVAE) -> None:
    latents = draw_latents(1, 48, 4, 2, 2)
    pixels = vae.decode(latents)
    for count in range(1, 4):
        assert torch.equal(vae.decode(latents[:, :, :count]), pixels[:, :, : 4 * count - 3])


def test_the_division_into_chunks_does_not_matter(vae: WanVAE) -> None:
    pixels, latents = draw_pixels(1, 3, 13, 32, 32), draw_latents(1, 48, 5, 2, 2)
    with torch.no_grad():
        for network, x, sizes in ((vae.encoder, pixels, (1, 8, 4)), (vae.decoder, latents, (1, 1, 3))):
            cache, whole = FeatureCache(), FeatureCache()
            parts = torch.cat([network(chunk, cache) for chunk in x.split(sizes, dim=2)], dim=2)
            first, rest = x[:, :, :1], x[:, :, 1:]
            assert relative_error(parts, torch.cat([network(first, whole), network(rest, whole)], dim=2)) < 1e-5


def test_no_more_than_one_chunk_is_in_flight(vae: WanVAE) -> None:
    seen: list[int] = []
    hooks = [
        network.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
        for network in (vae.encoder, vae.decoder)
    ]
    vae.encode(draw_pixels(1, 3, 13, 16, 16))
    vae.decode(draw_latents(1, 48, 3, 1, 1))
    for hook in hooks:
        hook.remove()
    assert seen == [1, 4, 4, 4, 1, 1, 1]


def test_nothing_stays_in_the_model(vae: WanVAE) -> None:
    pixels = draw_pixels(1, 3, 5, 32, 32)
    first = vae.encode(pixels)
    vae.encode(draw_pixels(1, 3, 9, 48, 64))
    assert torch.equal(vae.encode(pixels), first)


def test_clips_of_a_batch_do_not_mix(vae: WanVAE) -> None:
    pixels, latents = draw_pixels(2, 3, 5, 32, 48), draw_latents(2, 48, 2, 2, 3)
    assert relative_error(vae.encode(pixels)[1:], vae.encode(pixels[1:])) < 1e-5
    assert relative_error(vae.decode(latents)[1:], vae.decode(latents[1:])) < 1e-5


def test_the_cache_can_lie_in_main_memory(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, latents = draw_pixels(1, 3, 9, 32, 32), draw_latents(1, 48, 3, 2, 2)
    plain = vae.encode(pixels), vae.decode(latents)
    made: list[bool] = []
    build = FeatureCache.__init__
    monkeypatch.setattr(
        FeatureCache, "__init__", lambda self, *, on_cpu: made.append(on_cpu) or build(self, on_cpu=on_cpu)
    )
    vae.cache_on_cpu = True
    assert torch.equal(vae.encode(pixels), plain[0])
    assert torch.equal(vae.decode(latents), plain[1])
    assert made == [True, True]


@pytest.mark.parametrize(("height", "width", "tiling"), [(96, 640, Tiling(24, 8)), (448, 64, Tiling(24, 12))])
def test_tiles_change_the_result_by_less_than_a_hundredth(vae: WanVAE, height: int, width: int, tiling: Tiling) -> None:
    pixels = draw_smooth(5, height, width)
    latents = vae.encode(pixels)
    decoded = vae.decode(latents)
    vae.tiling = tiling
    assert 0 < relative_error(vae.encode(pixels), latents) < 0.01
    assert 0 < relative_error(vae.decode(latents), decoded) < 0.01
    assert vae.decode(latents).abs().max() <= 1


def test_the_large_layers_never_see_more_than_a_tile(vae: WanVAE) -> None:
    seen: list[tuple[int, ...]] = []
    layers = (vae.encoder.conv1, vae.decoder.head["2"])
    hooks = [x.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[-2:]))) for x in layers]
    vae.tiling = Tiling(6, 2)
    vae.decode(vae.encode(draw_smooth(5, 160, 112)))
    for hook in hooks:
        hook.remove()
    assert set(seen) == {(48, 48)}  # 96 pixels a side, in squares of two


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        ((1, 3, 4, 32, 32), "4n \\+ 1 frames, not 4"),
        ((1, 3, 5, 40, 32), "multiples of 16, not 32x40"),
        ((1, 3, 5, 32, 24), "multiples of 16, not 24x32"),
        ((3, 5, 32, 32), "B, 3, F"),
    ],
)
def test_odd_pixels_are_refused(vae: WanVAE, shape: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        vae.encode(torch.zeros(shape))


def test_odd_latents_are_refused(vae: WanVAE) -> None:
    with pytest.raises(ValueError, match="B, 48, T"):
        vae.decode(torch.zeros(1, 16, 1, 2, 2))


def test_patches_are_folded_columns_first() -> None:
    pixels = torch.arange(2 * 3 * 4 * 6.0).view(1, 2, 3, 4, 6)
    folded = fold_patches(pixels, 2)
    assert folded.shape == (1, 8, 3, 2, 3)
    for channel, column, row in ((c, r, q) for c in range(2) for r in range(2) for q in range(2)):
        expected = pixels[:, channel, :, row::2, column::2]
        assert torch.equal(folded[:, channel * 4 + column * 2 + row], expected)
    assert torch.equal(unfold_patches(folded, 2), pixels)
    assert torch.equal(fold_patches(pixels, 1), pixels) and torch.equal(unfold_patches(pixels, 1), pixels)


@pytest.mark.parametrize(("out_channels", "factors", "group"), [(3, (1, 2), 4), (6, (2, 2), 4), (3, (2, 2), 8)])
def test_going_down_neighbours_are_averaged_in_groups(out_channels: int, factors: tuple[int, int], group: int) -> None:
    """Position by position: the channel of a neighbour is ((c * t + time) * s + row) * s + column."""
    t, s = factors
    x = draw_latents(2, 3, 4, 4, 6)
    neighbours = [
        x[:, c, time::t, row::s, column::s]
        for c in range(3)
        for time in range(t)
        for row in range(s)
        for column in range(s)
    ]
    expected = [torch.stack(neighbours[i : i + group]).mean(0) for i in range(0, len(neighbours), group)]
    torch.testing.assert_close(average_neighbours(x, out_channels, factors), torch.stack(expected, dim=1))


def test_before_the_first_frame_lie_zeros() -> None:
    x = draw_latents(1, 2, 1, 2, 2)
    padded = torch.cat([torch.zeros_like(x), x], dim=2)
    torch.testing.assert_close(average_neighbours(x, 4, (2, 2)), average_neighbours(padded, 4, (2, 2)))


@pytest.mark.parametrize(("out_channels", "factors"), [(4, (2, 2)), (2, (2, 2)), (4, (1, 2)), (2, (1, 2))])
def test_going_up_channels_are_repeated_and_unfolded(out_channels: int, factors: tuple[int, int]) -> None:
    t, s = factors
    x = draw_latents(1, 4, 3, 2, 3)
    repeated = x.repeat_interleave(out_channels * t * s * s // 4, dim=1)
    whole = repeated.view(1, out_channels, t, s, s, 3, 2, 3).permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(1, -1, 3 * t, 4, 6)
    y = draw_latents(*whole.shape)
    torch.testing.assert_close(add_repeated(y.clone(), x, factors, first=False), y + whole)
    first = add_repeated(y[:, :, :1].clone(), x[:, :, :1], factors, first=True)
    torch.testing.assert_close(first, y[:, :, :1] + whole[:, :, t - 1 : t])


def test_the_tiny_vae_has_the_official_names_and_shapes() -> None:
    assert vae22_shapes(160, decoder_dim=256) == load_manifest("wan2.2-vae")
    assert {name: list(shape) for name, shape in vae22_shapes().items()} == load_case("wan22_vae").spec["shapes"]


def test_the_published_widths_go_through() -> None:
    with torch.device("meta"):
        vae = WanVAE(GEOMETRIES[KIND22])
        for network, chunks, shapes in (
            (vae.encoder, [(1, 3, 1, 32, 48), (1, 3, 4, 32, 48)], [(1, 96, 1, 2, 3)] * 2),
            (vae.decoder, [(1, 48, 1, 2, 3)] * 3, [(1, 3, 1, 32, 48), (1, 3, 4, 32, 48), (1, 3, 4, 32, 48)]),
        ):
            cache = FeatureCache()
            with torch.no_grad():
                assert [tuple(network(torch.empty(chunk), cache).shape) for chunk in chunks] == shapes


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("naming", [str, diffusers_name])
def test_files_and_names_load_alike(vae: WanVAE, tmp_path: Path, suffix: str, naming: Callable[[str], str]) -> None:
    path = tmp_path / f"vae.{suffix}"
    state = {naming(name): tensor for name, tensor in WEIGHTS.items()}
    if suffix == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    check_vae(path, latent_channels=48)
    loaded = load_vae(path, dtype=torch.bfloat16)
    assert {name: tuple(p.shape) for name, p in loaded.named_parameters()} == vae22_shapes()
    assert {(p.dtype, p.requires_grad) for p in loaded.parameters()} == {(torch.float32, False)}
    pixels = draw_pixels(1, 3, 5, 32, 32)
    assert torch.equal(loaded.encode(pixels), vae.encode(pixels))


def test_a_vae_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    old, new = tmp_path / "Wan2.1_VAE.safetensors", tmp_path / VAE22
    save(old, vae_shapes(), torch.float32)
    save(new, vae22_shapes(), torch.float32)
    with pytest.raises(InputError) as caught:
        check_vae(new)
    line = (
        f"--vae {new} is a Wan2.2 VAE with 48 latent channels, the model has 16: give Wan2.1_VAE.pth, or --task ti2v-5B"
    )
    assert str(caught.value) == line
    with pytest.raises(InputError) as caught:
        check_vae(old, "--other", latent_channels=48)
    line = f"--other {old} is a Wan2.1 VAE with 16 latent channels, the model has 48: give Wan2.2_VAE.pth"
    assert str(caught.value) == line
    check_vae(old)
    check_vae(new, latent_channels=48)
    assert [load_vae(path).latent_channels for path in (old, new)] == [16, 48]


def test_other_numbers_of_latent_channels_are_refused() -> None:
    state = {name: torch.empty(shape, device="meta") for name, shape in vae22_shapes(latents=24).items()}
    for look in (lambda: load_vae(state), lambda: check_vae(state, latent_channels=48)):
        with pytest.raises(InputError, match=r"is another VAE with 24 latent channels, .* 48: give Wan2\.2_VAE\.pth"):
            look()


CHANGED = "decoder.upsamples.1.upsamples.3.time_conv.weight"
BELOW = "encoder.downsamples.2.downsamples."


@pytest.mark.parametrize("naming", [str, diffusers_name])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state, name: state.pop(name), f"missing {CHANGED}"),
        (lambda state, name: state.update({name: state[name][1:]}), f"misshapen {CHANGED}"),
        (lambda state, name: state.update({"x": state[name]}), "unexpected x "),
        (
            lambda state, name: [state.pop(n) for n in list(state) if re.match(r"encoder\.down\w+\.2\.", n)],
            f"missing {BELOW}0.residual",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, complaint: str, naming: Callable[[str], str]) -> None:
    manifest = load_manifest("wan2.2-vae")
    state = {naming(name): torch.empty(shape, device="meta") for name, shape in manifest.items()}
    change(state, naming(CHANGED))
    for look in (lambda: check_vae(state, latent_channels=48), lambda: load_vae(state)):
        with pytest.raises(InputError, match=complaint):
            look()
