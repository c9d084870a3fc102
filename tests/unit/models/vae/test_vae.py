from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.golden import load_manifest, relative_error
from tests.unit.models.vae.vaes import WAN21, SmallVae, draw_pixels
from wan_train.errors import InputError
from wan_train.models.vae.layers import FeatureCache
from wan_train.models.vae.vae import WanVAE, check_vae, denormalise, load_vae, normalise

WEIGHTS = WAN21.weights


@pytest.fixture(scope="module")
def small() -> SmallVae:
    return WAN21


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


def test_normalising_is_undone() -> None:
    x = torch.randn(2, 16, 3, 2, 2, dtype=torch.float64)
    mean, std = torch.randn(16).tolist(), torch.rand(16).add(0.1).tolist()
    normalised = normalise(x, mean, std)
    assert torch.allclose(denormalise(normalised, mean, std), x)
    assert torch.allclose(normalised[:, 3] * std[3] + mean[3], x[:, 3])


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
        "vae32": (other_vae, "another VAE with 32 latent channels, but the model has 16: give Wan2.1_VAE.pth"),
        "other": ({"x": torch.zeros(1)}, "is of an unknown kind"),
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
