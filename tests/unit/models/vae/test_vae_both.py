"""What the VAEs of Wan2.1 and of Wan2.2 have in common: sizes, chunks of frames, tiles, files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.golden import relative_error
from tests.unit.models.vae.vaes import WAN21, WAN22, SmallVae, draw_smooth
from wan_train.models.vae.layers import FeatureCache
from wan_train.models.vae.names import diffusers_name
from wan_train.models.vae.tiling import Tiling
from wan_train.models.vae.vae import WanVAE, check_vae, load_vae


def test_sizes_and_types(small: SmallVae, vae: WanVAE) -> None:
    assert (vae.latent_channels, vae.stride, vae.frame_stride) == (small.channels, small.stride, 4)
    latents = vae.encode(small.pixels(2, 5, 2, 3).double())
    assert latents.shape == (2, small.channels, 2, 2, 3)
    pixels = vae.decode(latents.bfloat16())
    assert pixels.shape == (2, 3, 5, 2 * small.stride, 3 * small.stride)
    assert latents.dtype is pixels.dtype is torch.float32
    assert not latents.requires_grad and not pixels.requires_grad
    assert pixels.abs().max() <= 1


def test_encoding_streams(small: SmallVae, vae: WanVAE) -> None:
    """The latents of the first 1 + 4k frames do not depend on what follows."""
    pixels = small.pixels(1, 13, 2, 2)
    latents = vae.encode(pixels)
    for count in range(1, 4):
        assert torch.equal(vae.encode(pixels[:, :, : 4 * count - 3]), latents[:, :, :count])


def test_decoding_streams(small: SmallVae, vae: WanVAE) -> None:
    latents = small.latents(1, 4, 2, 2)
    pixels = vae.decode(latents)
    for count in range(1, 4):
        assert torch.equal(vae.decode(latents[:, :, :count]), pixels[:, :, : 4 * count - 3])


@pytest.mark.parametrize("tiling", [None, Tiling(2, 1)])
def test_chunks_are_decoded_one_by_one_and_together_are_the_whole(
    tiling: Tiling | None, small: SmallVae, vae: WanVAE
) -> None:
    latents = small.latents(1, 4, 3, 2)
    vae.tiling = tiling
    whole = vae.decode(latents)
    seen: list[int] = []
    hook = vae.decoder.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    chunks = vae.decode_chunks(latents)
    first = next(chunks)
    assert len(seen) == (1 if tiling is None else 4)  # tiles need the features of all frames
    parts = [first, *chunks]
    hook.remove()
    assert [part.shape[2] for part in parts] == [1, 4, 4, 4] and not parts[-1].requires_grad
    assert torch.equal(torch.cat(parts, dim=2), whole)


def test_the_division_into_chunks_does_not_matter(small: SmallVae, vae: WanVAE) -> None:
    pixels, latents = small.pixels(1, 13, 2, 2), small.latents(1, 5, 2, 2)
    with torch.no_grad():
        for network, x, sizes in ((vae.encoder, pixels, (1, 8, 4)), (vae.decoder, latents, (1, 1, 3))):
            cache, whole = FeatureCache(), FeatureCache()
            parts = torch.cat([network(chunk, cache) for chunk in x.split(sizes, dim=2)], dim=2)
            first, rest = x[:, :, :1], x[:, :, 1:]
            assert relative_error(parts, torch.cat([network(first, whole), network(rest, whole)], dim=2)) < 1e-5


def test_at_most_one_chunk_is_in_flight(small: SmallVae, vae: WanVAE) -> None:
    seen: list[int] = []
    hooks = [
        network.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
        for network in (vae.encoder, vae.decoder)
    ]
    vae.encode(small.pixels(1, 13, 1, 1))
    vae.decode(small.latents(1, 3, 1, 1))
    for hook in hooks:
        hook.remove()
    assert seen == [1, 4, 4, 4, 1, 1, 1]


def test_what_is_kept_between_chunks_does_not_grow(small: SmallVae, vae: WanVAE) -> None:
    pixels, cache, held = small.pixels(1, 13, 2, 2), FeatureCache(), []
    with torch.no_grad():
        for chunk in pixels.split((1, 4, 4, 4), dim=2):
            vae.encoder(chunk, cache)
            held.append(sum(frames.untyped_storage().nbytes() for frames in cache._frames.values()))
    assert held[1] == held[2] == held[3]


def test_nothing_stays_in_the_model(small: SmallVae, vae: WanVAE) -> None:
    pixels = small.pixels(1, 5, 2, 2)
    first = vae.encode(pixels)
    vae.encode(small.pixels(1, 9, 3, 4))
    assert torch.equal(vae.encode(pixels), first)


def test_clips_of_a_batch_do_not_mix(small: SmallVae, vae: WanVAE) -> None:
    pixels, latents = small.pixels(2, 5, 2, 3), small.latents(2, 2, 2, 3)
    assert relative_error(vae.encode(pixels)[1:], vae.encode(pixels[1:])) < 1e-5
    assert relative_error(vae.decode(latents)[1:], vae.decode(latents[1:])) < 1e-5


def test_the_cache_can_lie_in_host_memory(small: SmallVae, vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, latents = small.pixels(1, 9, 2, 2), small.latents(1, 3, 2, 2)
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


@pytest.mark.parametrize(
    ("small", "height", "width", "tiling"),
    [
        (WAN21, 96, 320, Tiling(24, 8)),
        (WAN21, 256, 224, Tiling(24, 12)),
        (WAN22, 96, 640, Tiling(24, 8)),
        (WAN22, 448, 64, Tiling(24, 12)),
    ],
    indirect=["small"],
)
def test_tiles_change_the_result_by_less_than_a_hundredth(vae: WanVAE, height: int, width: int, tiling: Tiling) -> None:
    pixels = draw_smooth(5, height, width)
    latents = vae.encode(pixels)
    decoded = vae.decode(latents)
    vae.tiling = tiling
    assert 0 < relative_error(vae.encode(pixels), latents) < 0.01
    assert 0 < relative_error(vae.decode(latents), decoded) < 0.01
    assert vae.decode(latents).abs().max() <= 1


def test_the_large_layers_never_see_more_than_a_tile(small: SmallVae, vae: WanVAE) -> None:
    seen: list[tuple[int, ...]] = []
    layers = (vae.encoder.conv1, vae.decoder.head["2"])
    hooks = [x.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[-2:]))) for x in layers]
    vae.tiling = Tiling(6, 2)
    vae.decode(vae.encode(draw_smooth(5, 10 * small.stride, 7 * small.stride)))
    for hook in hooks:
        hook.remove()
    assert set(seen) == {(48, 48)}  # six cells of 8 pixels, or of 16 in squares of two


@pytest.mark.parametrize(
    ("small", "shape", "complaint"),
    [
        (WAN21, (1, 3, 4, 16, 16), "4n \\+ 1 frames, not 4"),
        (WAN21, (1, 3, 5, 12, 16), "multiples of 8, not 16x12"),
        (WAN21, (3, 5, 16, 16), "B, 3, F"),
        (WAN21, (1, 1, 1, 8, 8), "B, 3"),
        (WAN22, (1, 3, 4, 32, 32), "4n \\+ 1 frames, not 4"),
        (WAN22, (1, 3, 5, 40, 32), "multiples of 16, not 32x40"),
        (WAN22, (1, 3, 5, 32, 24), "multiples of 16, not 24x32"),
        (WAN22, (3, 5, 32, 32), "B, 3, F"),
    ],
    indirect=["small"],
)
def test_odd_pixels_are_refused(vae: WanVAE, shape: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        vae.encode(torch.zeros(shape))


def test_odd_latents_are_refused(small: SmallVae, vae: WanVAE) -> None:
    with pytest.raises(ValueError, match=f"B, {small.channels}, T"):
        vae.decode(torch.zeros(1, 64 - small.channels, 1, 2, 2))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("naming", [str, diffusers_name])
def test_files_and_names_load_alike(
    small: SmallVae, vae: WanVAE, tmp_path: Path, suffix: str, naming: Callable[[str], str]
) -> None:
    path = tmp_path / f"vae.{suffix}"
    state = {naming(name): tensor for name, tensor in small.weights.items()}
    if suffix == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    check_vae(path, latent_channels=small.channels)
    loaded = load_vae(path, dtype=torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in small.weights.items()}
    assert {name: tuple(p.shape) for name, p in loaded.named_parameters()} == shapes
    assert {(p.dtype, p.requires_grad) for p in loaded.parameters()} == {(torch.float32, False)}
    pixels = small.pixels(1, 5, 2, 2)
    assert torch.equal(loaded.encode(pixels), vae.encode(pixels))
