from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.parity.golden import load_case, load_manifest, relative_error
from wan_train.errors import InputError
from wan_train.models.vae.layers import FeatureCache
from wan_train.models.vae.names import diffusers_name
from wan_train.models.vae.vae import WanVAE, check_vae, denormalise, load_vae, normalise

WEIGHTS = load_case("wan21_vae").state_dict()  # eight channels wide


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return load_vae(WEIGHTS)


def draw_pixels(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def draw_latents(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_sizes_and_types(vae: WanVAE) -> None:
    latents = vae.encode(draw_pixels(1, 3, 5, 16, 24).double())
    assert latents.shape == (1, 16, 2, 2, 3)
    pixels = vae.decode(latents.bfloat16())
    assert pixels.shape == (1, 3, 5, 16, 24)
    assert latents.dtype is pixels.dtype is torch.float32
    assert not latents.requires_grad and not pixels.requires_grad
    assert pixels.abs().max() <= 1


def test_encoding_streams(vae: WanVAE) -> None:
    """The latents of the first 1 + 4k frames do not depend on what follows."""
    pixels = draw_pixels(1, 3, 13, 16, 16)
    latents = vae.encode(pixels)
    for count in range(1, 4):
        assert torch.equal(vae.encode(pixels[:, :, : 4 * count - 3]), latents[:, :, :count])


def test_decoding_streams(vae: WanVAE) -> None:
    latents = draw_latents(1, 16, 4, 2, 2)
    pixels = vae.decode(latents)
    for count in range(1, 4):
        assert torch.equal(vae.decode(latents[:, :, :count]), pixels[:, :, : 4 * count - 3])


def test_the_division_into_chunks_does_not_matter(vae: WanVAE) -> None:
    pixels, latents = draw_pixels(1, 3, 13, 16, 16), draw_latents(1, 16, 5, 2, 2)
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
    vae.decode(draw_latents(1, 16, 3, 2, 2))
    for hook in hooks:
        hook.remove()
    assert seen == [1, 4, 4, 4, 1, 1, 1]


def test_what_is_kept_between_chunks_does_not_grow(vae: WanVAE) -> None:
    pixels, cache, held = draw_pixels(1, 3, 13, 16, 16), FeatureCache(), []
    with torch.no_grad():
        for chunk in pixels.split((1, 4, 4, 4), dim=2):
            vae.encoder(chunk, cache)
            held.append(sum(frames.untyped_storage().nbytes() for frames in cache._frames.values()))
    assert held[1] == held[2] == held[3]


def test_nothing_stays_in_the_model(vae: WanVAE) -> None:
    pixels = draw_pixels(1, 3, 5, 16, 16)
    first = vae.encode(pixels)
    vae.encode(draw_pixels(1, 3, 9, 24, 32))
    assert torch.equal(vae.encode(pixels), first)


def test_clips_of_a_batch_do_not_mix(vae: WanVAE) -> None:
    pixels, latents = draw_pixels(2, 3, 5, 16, 24), draw_latents(2, 16, 2, 2, 3)
    assert relative_error(vae.encode(pixels)[1:], vae.encode(pixels[1:])) < 1e-5
    assert relative_error(vae.decode(latents)[1:], vae.decode(latents[1:])) < 1e-5


def test_the_cache_can_lie_in_main_memory(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, latents = draw_pixels(1, 3, 9, 16, 16), draw_latents(1, 16, 3, 2, 2)
    plain = vae.encode(pixels), vae.decode(latents)
    made: list[bool] = []
    build = FeatureCache.__init__
    monkeypatch.setattr(
        FeatureCache, "__init__", lambda self, *, on_cpu: made.append(on_cpu) or build(self, on_cpu=on_cpu)
    )
    monkeypatch.setattr(vae, "cache_on_cpu", True)
    assert torch.equal(vae.encode(pixels), plain[0])
    assert torch.equal(vae.decode(latents), plain[1])
    assert made == [True, True]


@pytest.mark.gpu
def test_the_cache_leaves_an_accelerator() -> None:
    vae = load_vae(WEIGHTS, device="cuda", dtype=torch.bfloat16)
    cache = FeatureCache(on_cpu=True)
    with torch.no_grad():
        vae.encoder(draw_pixels(1, 3, 1, 16, 16).to("cuda", torch.bfloat16), cache)
    assert {frames.device.type for frames in cache._frames.values()} == {"cpu"}
    pixels = draw_pixels(1, 3, 9, 32, 32)
    plain = vae.encode(pixels)
    assert plain.device.type == "cpu"
    assert relative_error(plain, load_vae(WEIGHTS).encode(pixels)) < 0.05
    vae.cache_on_cpu = True
    assert torch.equal(vae.encode(pixels), plain)


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        ((1, 3, 4, 16, 16), "4n \\+ 1"),
        ((1, 3, 5, 12, 16), "multiples of 8"),
        ((3, 5, 16, 16), "B, 3, F"),
        ((1, 1, 1, 8, 8), "B, 3"),
    ],
)
def test_odd_pixels_are_refused(vae: WanVAE, shape: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        vae.encode(torch.zeros(shape))


def test_odd_latents_are_refused(vae: WanVAE) -> None:
    with pytest.raises(ValueError, match="B, 16, T"):
        vae.decode(torch.zeros(1, 48, 1, 2, 2))


def test_normalising_is_undone() -> None:
    x = torch.randn(2, 16, 3, 2, 2, dtype=torch.float64)
    mean, std = torch.randn(16).tolist(), torch.rand(16).add(0.1).tolist()
    normalised = normalise(x, mean, std)
    assert torch.allclose(denormalise(normalised, mean, std), x)
    assert torch.allclose(normalised[:, 3] * std[3] + mean[3], x[:, 3])


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("naming", [str, diffusers_name])
def test_files_and_names_load_alike(vae: WanVAE, tmp_path: Path, suffix: str, naming) -> None:
    path = tmp_path / f"vae.{suffix}"
    state = {naming(name): tensor for name, tensor in WEIGHTS.items()}
    if suffix == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    check_vae(path)
    loaded = load_vae(path)
    assert {name: tuple(p.shape) for name, p in loaded.named_parameters()} == {
        n: tuple(t.shape) for n, t in WEIGHTS.items()
    }
    assert not any(p.requires_grad for p in loaded.parameters())
    pixels = draw_pixels(1, 3, 5, 16, 16)
    assert torch.equal(loaded.encode(pixels), vae.encode(pixels))


def test_a_cpu_computes_in_float32_whatever_is_stored(tmp_path: Path) -> None:
    save_file({name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}, tmp_path / "vae.safetensors")
    vae = load_vae(tmp_path / "vae.safetensors", dtype=torch.bfloat16)
    twin = load_vae({name: tensor.bfloat16().float() for name, tensor in WEIGHTS.items()})
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    pixels = draw_pixels(1, 3, 5, 16, 16)
    assert torch.equal(vae.encode(pixels), twin.encode(pixels))


def test_loading_leaves_the_given_weights_alone(vae: WanVAE) -> None:
    state = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
    loaded = load_vae(state)
    for tensor in state.values():
        tensor.zero_()
    pixels = draw_pixels(1, 3, 1, 16, 16)
    assert torch.equal(loaded.encode(pixels), vae.encode(pixels))


CHANGED = "decoder.upsamples.7.time_conv.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop(CHANGED), f"missing {CHANGED}"),
        (lambda state: state.update({CHANGED + "s": state.pop(CHANGED)}), f"unexpected {CHANGED}s"),
        (lambda state: state.update({CHANGED: state[CHANGED][1:]}), f"misshapen {CHANGED}"),
        (
            lambda state: state.pop("encoder.downsamples.6.residual.6.bias"),
            "missing encoder.downsamples.6.residual.6.bias",
        ),
        (lambda state: state.pop("encoder.conv1.weight"), "missing encoder.conv1.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, complaint: str) -> None:
    state = {name: torch.empty(shape, device="meta") for name, shape in load_manifest("wan2.1-vae").items()}
    change(state)
    for look in (check_vae, load_vae):
        with pytest.raises(InputError, match=complaint) as caught:
            look(state)
        assert str(caught.value).count(";") <= 1


def test_a_wrong_file_is_refused_by_name(tmp_path: Path) -> None:
    other_vae = {**WEIGHTS, "conv2.weight": torch.zeros(32, 32, 1, 1, 1), "conv2.bias": torch.zeros(32)}
    files = {
        "dit": ({"head.modulation": torch.zeros(1, 2, 8)}, "is a Wan DiT, not a VAE"),
        "vae32": (other_vae, "another VAE with 32 latent channels, the model has 16: give Wan2.1_VAE.pth"),
        "other": ({"x": torch.zeros(1)}, "none of the known models"),
    }
    for name, (state, complaint) in files.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(state, path)
        with pytest.raises(InputError, match=f"--vae .*{name}.safetensors.*{complaint}"):
            check_vae(path)
        with pytest.raises(InputError, match=complaint):
            load_vae(path)


def test_an_unreadable_file_is_refused_by_name(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "whole.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    for name in ("half", "absent"):
        with pytest.raises(InputError, match=f"{name}.safetensors"):
            check_vae(tmp_path / f"{name}.safetensors")
