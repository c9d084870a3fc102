"""Our VAEs against the official ones' stored outputs, diffusers' and the published names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.golden import TOLERANCE, load_case, load_manifest, relative_error
from wan_train.models.vae import wan21, wan22
from wan_train.models.vae.names import diffusers_name
from wan_train.models.vae.vae import WanVAE, check_vae, load_vae

CASES = {name: load_case(name) for name in ("wan21_vae", "wan22_vae")}


@dataclass(frozen=True)
class Published:
    """A published VAE: what diffusers calls its sizes (`small` for a test), and our statistics of its latents."""

    case: str
    manifest: str
    channels: int
    stride: int
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    sizes: dict[str, Any]
    small: dict[str, Any]


VAES = [
    Published("wan21_vae", "wan2.1-vae", 16, 8, (wan21.LATENT_MEAN, wan21.LATENT_STD), {}, {"base_dim": 8}),
    Published(
        "wan22_vae",
        "wan2.2-vae",
        48,
        16,
        (wan22.LATENT_MEAN, wan22.LATENT_STD),
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "is_residual": True,
            "scale_factor_spatial": 16,
        },
        {"base_dim": 8, "decoder_base_dim": 12},
    ),
]
FRAMES = [(name, frames) for name, case in CASES.items() for frames in case.spec["frames"]]


@pytest.fixture(scope="module")
def vaes() -> dict[str, WanVAE]:
    return {name: load_vae(case.state_dict()) for name, case in CASES.items()}


@pytest.mark.parametrize(("name", "frames"), FRAMES)
def test_encodes_as_the_official_model(vaes: dict[str, WanVAE], name: str, frames: int) -> None:
    case = CASES[name]
    shape = (1, 3, frames, case.spec["height"], case.spec["width"])
    pixels = case.normal(f"video.{frames}", shape).tanh()
    assert relative_error(vaes[name].encode(pixels), case.outputs[f"latent.{frames}"]) < TOLERANCE


@pytest.mark.parametrize(("name", "frames"), FRAMES)
def test_decodes_as_the_official_model(vaes: dict[str, WanVAE], name: str, frames: int) -> None:
    case = CASES[name]
    latents = case.normal(f"z.{frames}", case.outputs[f"latent.{frames}"].shape)
    assert relative_error(vaes[name].decode(latents), case.outputs[f"video_out.{frames}"]) < TOLERANCE


@pytest.mark.parametrize("published", VAES, ids=lambda published: published.case)
def test_the_statistics_are_those_of_the_official_model(vaes: dict[str, WanVAE], published: Published) -> None:
    vae, spec, (mean, std) = vaes[published.case], CASES[published.case].spec, published.statistics
    assert len(mean) == len(std) == vae.latent_channels == published.channels
    assert pytest.approx(spec["mean"]) == mean == vae.latent_mean
    assert pytest.approx(spec["std"]) == std == vae.latent_std


@pytest.mark.parametrize("published", VAES, ids=lambda published: published.case)
def test_a_diffusers_file_gives_what_diffusers_computes(tmp_path: Path, published: Published) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(**{**published.sizes, **published.small}).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(theirs.state_dict(), tmp_path / "vae.safetensors")
    ours = load_vae(tmp_path / "vae.safetensors")
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in published.statistics)
    pixels = torch.rand(2, 3, 9, 4 * published.stride, 3 * published.stride) * 2 - 1
    latents = torch.randn(2, published.channels, 3, 4, 3)
    encoded = (theirs.encode(pixels).latent_dist.mode() - mean) / std
    assert relative_error(ours.encode(pixels), encoded) < TOLERANCE
    assert relative_error(ours.decode(latents), theirs.decode(latents * std + mean).sample) < TOLERANCE


@pytest.mark.parametrize("published", VAES, ids=lambda published: published.case)
def test_the_published_files_fit(published: Published) -> None:
    manifest = load_manifest(published.manifest)
    weights = {name: torch.empty(shape, device="meta") for name, shape in manifest.items()}
    check_vae(weights, latent_channels=published.channels)
    renamed = {diffusers_name(name): tensor for name, tensor in weights.items()}
    check_vae(renamed, latent_channels=published.channels)


@pytest.mark.parametrize("published", VAES, ids=lambda published: published.case)
def test_the_diffusers_names_are_those_of_diffusers(published: Published) -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan(**published.sizes)
    manifest = load_manifest(published.manifest)
    ours = {diffusers_name(name): shape for name, shape in manifest.items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
