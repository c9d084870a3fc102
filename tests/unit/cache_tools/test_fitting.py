import pytest
import torch

import wan_train
from cache_tools.fitting import encode_fitting
from cache_tools.settings import LATENTS_TOOL
from tests.unit.dataset.drawing import make_clips, write_toml
from wan_train.cli import run
from wan_train.errors import RunError
from wan_train.models.vae.tiling import Tiling


class SmallDevice:
    """Stands in for a VAE on a device with room for so many clips, or for tiles of so many cells."""

    def __init__(self, num_clips: int, num_cells: int, problem: type[RuntimeError] = torch.OutOfMemoryError) -> None:
        self.num_clips, self.num_cells, self.problem = num_clips, num_cells, problem
        self.tiling: Tiling | None = None
        self.done: list[tuple[str, int | None]] = []

    def encode(self, batch) -> None:
        fits = self.tiling.size <= self.num_cells if self.tiling else len(batch) <= self.num_clips
        if not fits:
            raise self.problem("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")
        self.done += [(one, self.tiling and self.tiling.size) for one in batch]


def encode(device: SmallDevice, batch: list[str]) -> list[tuple[str, int | None]]:
    encode_fitting(device, batch, device.encode, name=str)
    return device.done


def test_what_fits_is_encoded_at_once() -> None:
    assert encode(SmallDevice(3, 0), ["a", "b", "c"]) == [("a", None), ("b", None), ("c", None)]


@pytest.mark.parametrize("problem", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_with_a_batch_takes_one_clip_at_a_time(problem, caplog) -> None:
    assert encode(SmallDevice(1, 0, problem), ["a", "b"]) == [("a", None), ("b", None)]
    assert "2 clips per batch (a" in caplog.text


def test_a_clip_that_does_not_fit_alone_goes_in_ever_smaller_tiles(caplog) -> None:
    device = SmallDevice(0, 17)
    assert encode(device, ["a", "b"]) == [("a", 17), ("b", 17)]
    assert device.tiling is None
    assert "a: retrying with tiles of 34" in caplog.text and "b: retrying with tiles of 17" in caplog.text


def test_tiles_that_were_asked_for_get_smaller(caplog) -> None:
    device = SmallDevice(0, 30)
    device.tiling = Tiling(40, 10)
    assert encode(device, ["a"]) == [("a", 20)]
    assert device.tiling == Tiling(40, 10)


def test_a_clip_that_fits_in_no_way_ends_the_run_by_name() -> None:
    device = SmallDevice(0, 4)
    with pytest.raises(RunError, match=r"encode b, .*--vae_cache_cpu"):
        encode(device, ["b"])
    assert device.tiling is None


def test_other_errors_are_not_retried() -> None:
    device = SmallDevice(0, 0)
    with pytest.raises(RuntimeError, match="a bug"):
        encode_fitting(device, ["a"], lambda batch: (_ for _ in ()).throw(RuntimeError("a bug")), name=str)


def test_caching_retries_and_names_the_clip(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    make_clips(tmp_path / "clips", {"a": 9, "b": 9})
    write_toml(
        tmp_path / "data.toml",
        '[[datasets]]\nvideo_directory = "clips"\nresolution = [64, 48]\nbatch_size = 2\ntarget_frames = [9]',
    )
    (tmp_path / "vae.safetensors").write_bytes(b"vae")
    monkeypatch.setattr("cache_tools.cache_latents.check_vae", lambda path, **more: None)
    vae = SmallDevice(0, 34)

    def encode_pixels(pixels):
        vae.encode(list(pixels))
        b, _, f, h, w = pixels.shape
        return torch.zeros(b, 16, 1 + (f - 1) // 4, h // 8, w // 8)

    fake = type("Fake", (), {"encode": staticmethod(encode_pixels), "tiling": property(lambda self: vae.tiling)})
    fake.tiling = fake.tiling.setter(lambda self, tiling: setattr(vae, "tiling", tiling))
    monkeypatch.setattr(wan_train, "load_vae", lambda *args, **options: fake(), raising=False)
    arguments = ["--dataset_config", "data.toml", "--vae", "vae.safetensors", "--device", "cpu"]
    assert run(LATENTS_TOOL, arguments) == 0
    error = capsys.readouterr().err
    assert "out of memory with clips/b.mp4 from frame 0: retrying with tiles of 34 latent cells" in error
    assert "2 encoded" in error and len(list(tmp_path.glob("clips/*_wan.safetensors"))) == 2
