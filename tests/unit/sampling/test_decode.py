"""What the VAE's options do where a preview and the generator decode."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import wan_train.models.vae.vae
from generate.models import Models
from generate.settings import TOOL as GENERATE_TOOL
from tests.parity.golden import load_case
from wan_train.cli import parse
from wan_train.models.settings import VaeSettings
from wan_train.models.vae.layers import FeatureCache
from wan_train.models.vae.vae import WanVAE
from wan_train.models.variants import VARIANTS
from wan_train.sampling import decode
from wan_train.sampling.decode import decode_frames, open_vae
from wan_train.sampling.request import preview_defaults
from wan_train.training.build import make_previewer

CPU = torch.device("cpu")
LATENTS = torch.randn(16, 3, 6, 9, generator=torch.Generator().manual_seed(0))
ALL = VaeSettings(vae="", vae_cache_cpu=True, vae_tiling=True, vae_tile_size=4, vae_tile_overlap=2)


@pytest.fixture
def path(tmp_path: Path) -> str:
    save_file(load_case("wan21_vae").state_dict(), tmp_path / "vae.safetensors")
    return str(tmp_path / "vae.safetensors")


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_the_precision_is_the_one_that_is_asked_for_but_float32_on_a_cpu(
    name: str, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = open_vae(VaeSettings(vae=path, vae_dtype=name), CPU)
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    asked: dict[str, Any] = {}
    monkeypatch.setattr(decode, "load_vae", lambda _, **options: asked.update(options) or SimpleNamespace())
    open_vae(VaeSettings(vae=path, vae_dtype=name), torch.device("cuda"))
    assert asked == {"device": torch.device("cuda"), "dtype": dtype}


def decoded(vae: WanVAE, device: torch.device) -> np.ndarray:
    return np.stack(list(decode_frames(vae, LATENTS, device)))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Whether each frame cache lay in CPU RAM, and how large each tile was."""
    seen = SimpleNamespace(on_cpu=[], tiles=[])
    build, blend = FeatureCache.__init__, wan_train.models.vae.vae.blend_tiles

    def init(self: FeatureCache, *, on_cpu: bool = False) -> None:
        seen.on_cpu.append(on_cpu)
        build(self, on_cpu=on_cpu)

    def spy(function: Any, x: Tensor, *given: Any, **options: Any) -> Tensor:
        return blend(lambda tile: seen.tiles.append(tile.shape[-2:]) or function(tile), x, *given, **options)

    monkeypatch.setattr(FeatureCache, "__init__", init)
    monkeypatch.setattr(wan_train.models.vae.vae, "blend_tiles", spy)
    return seen


def options_of(settings: VaeSettings, path: str) -> list[str]:
    flags = ["--vae", path, "--vae_tile_size", str(settings.vae_tile_size)]
    flags += ["--vae_tile_overlap", str(settings.vae_tile_overlap)]
    return flags + ["--vae_cache_cpu"] * settings.vae_cache_cpu + ["--vae_tiling"] * settings.vae_tiling


def generate_frames(settings: VaeSettings, path: str, _: pytest.MonkeyPatch) -> np.ndarray:
    """The frames that the generator would write for these latents."""
    command = ["--dit", "x", "--prompt", "a cat", "--save_path", "x.mp4", *options_of(settings, path)]
    models = Models(parse(GENERATE_TOOL.settings, command), {}, CPU)
    with models.vae() as vae:
        return np.stack(list(models.decode(vae, LATENTS)))


def preview_frames(settings: VaeSettings, path: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The frames that a preview would write for these latents."""
    run = SimpleNamespace(vae=VaeSettings(**{**vars(settings), "vae": path}), text=None, image=None, save=None)
    plan = SimpleNamespace(requests=[preview_defaults(VARIANTS["t2v-1.3B"])], variant=SimpleNamespace(fps=16))
    previewer = make_previewer(run, plan, {}, SimpleNamespace(device=CPU), 0)  # type: ignore[arg-type]
    assert previewer is not None
    return decoded(previewer.vae, previewer.device)


@pytest.mark.parametrize("frames_of", [generate_frames, preview_frames])
def test_cache_and_tiles_act_in_previews_and_in_the_generator(
    frames_of: Any, path: str, seen: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = frames_of(VaeSettings(), path, monkeypatch)
    assert plain.shape == (9, 48, 72, 3)
    assert seen.on_cpu and not any(seen.on_cpu) and not seen.tiles
    seen.on_cpu.clear()
    tiled = frames_of(ALL, path, monkeypatch)
    assert all(seen.on_cpu) and set(seen.tiles) == {(4, 4)} and len(seen.tiles) == 2 * 4
    assert tiled.shape == plain.shape and not np.array_equal(tiled, plain)
    alone = frames_of(VaeSettings(vae_cache_cpu=True), path, monkeypatch)
    assert np.array_equal(alone, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_a_preview_s_vae_decodes_on_the_device_and_goes_back(name: str, path: str) -> None:
    device = torch.device("cuda")
    here = decoded(open_vae(VaeSettings(vae=path), CPU), CPU)
    for settings in (VaeSettings(vae=path, vae_dtype=name), VaeSettings(vae=path, vae_dtype=name, vae_cache_cpu=True)):
        vae: WanVAE = open_vae(settings, device)
        there = decoded(vae, device)
        assert {p.dtype for p in vae.parameters()} == {decode.dtype_of(name)}
        assert np.abs(there.astype(int) - here.astype(int)).mean() < 2
        vae.to("cpu")
        assert not any(p.is_cuda for p in vae.parameters())


class Small:
    """A VAE of three chunks, of which the device has no memory for this many whole ones."""

    def __init__(self, num_fitting: int, *, fits_tiles: bool = True) -> None:
        self.tiling: object = None
        self.strips: object = None
        self.num_fitting, self.fits_tiles = num_fitting, fits_tiles

    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        tiled = self.tiling is not None
        for index in range(3):
            if not (self.fits_tiles if tiled else index < self.num_fitting):
                raise torch.OutOfMemoryError("no room")
            yield torch.full((1, 3, 4 if index else 1, 8, 8), 1.0 if tiled else -1.0)


@pytest.mark.parametrize("num_fitting", [0, 1, 2])
def test_frames_that_do_not_fit_are_all_decoded_in_tiles_with_a_warning(
    num_fitting: int, capsys: pytest.CaptureFixture[str]
) -> None:
    vae: Any = Small(num_fitting)
    frames = decoded(vae, CPU)
    assert frames.shape == (9, 8, 8, 3) and frames.min() == 255
    assert vae.tiling is None  # the next one may fit
    assert "--vae_tiling" in capsys.readouterr().err
    with pytest.raises(torch.OutOfMemoryError):
        decoded(Small(num_fitting, fits_tiles=False), CPU)  # type: ignore[arg-type]
