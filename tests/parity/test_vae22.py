"""Our Wan2.2 VAE against the official one's stored outputs, diffusers' and the published names."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.golden import TOLERANCE, load_case, load_manifest, relative_error
from wan_train.models.vae.names import diffusers_name
from wan_train.models.vae.vae import check_vae, load_vae
from wan_train.models.vae.wan22 import LATENT_MEAN, LATENT_STD

CASE = load_case("wan22_vae")
PUBLISHED = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "is_residual": True,
    "scale_factor_spatial": 16,
}


@pytest.fixture(scope="module")
def vae():
    return load_vae(CASE.state_dict())


@pytest.mark.parametrize("frames", CASE.spec["frames"])
def test_encodes_as_the_official_model(vae, frames: int) -> None:
    shape = (1, 3, frames, CASE.spec["height"], CASE.spec["width"])
    pixels = CASE.normal(f"video.{frames}", shape).tanh()
    assert relative_error(vae.encode(pixels), CASE.outputs[f"latent.{frames}"]) < TOLERANCE


@pytest.mark.parametrize("frames", CASE.spec["frames"])
def test_decodes_as_the_official_model(vae, frames: int) -> None:
    latents = CASE.normal(f"z.{frames}", CASE.outputs[f"latent.{frames}"].shape)
    assert relative_error(vae.decode(latents), CASE.outputs[f"video_out.{frames}"]) < TOLERANCE


def test_the_statistics_are_those_of_the_official_model(vae) -> None:
    assert len(LATENT_MEAN) == len(LATENT_STD) == vae.latent_channels == 48
    assert pytest.approx(CASE.spec["mean"]) == LATENT_MEAN == vae.latent_mean
    assert pytest.approx(CASE.spec["std"]) == LATENT_STD == vae.latent_std


def test_a_diffusers_file_gives_what_diffusers_computes(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {**PUBLISHED, "base_dim": 8, "decoder_base_dim": 12}
    theirs = diffusers.AutoencoderKLWan(**sizes).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(theirs.state_dict(), tmp_path / "vae.safetensors")
    ours = load_vae(tmp_path / "vae.safetensors")
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
    pixels, latents = torch.rand(2, 3, 9, 64, 48) * 2 - 1, torch.randn(2, 48, 3, 4, 3)
    encoded = (theirs.encode(pixels).latent_dist.mode() - mean) / std
    assert relative_error(ours.encode(pixels), encoded) < TOLERANCE
    assert relative_error(ours.decode(latents), theirs.decode(latents * std + mean).sample) < TOLERANCE


def test_the_published_files_fit() -> None:
    manifest = load_manifest("wan2.2-vae")
    weights = {name: torch.empty(shape, device="meta") for name, shape in manifest.items()}
    check_vae(weights, latent_channels=48)
    check_vae({diffusers_name(name): tensor for name, tensor in weights.items()}, latent_channels=48)


def test_the_diffusers_names_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan(**PUBLISHED)
    manifest = load_manifest("wan2.2-vae")
    ours = {diffusers_name(name): shape for name, shape in manifest.items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
