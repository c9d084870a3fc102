"""From files to what a control model reads, against arrays worked out here by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from wan_train.conditions.camera import camera_path, read_camera_file
from wan_train.conditions.conditions import ImageConditions
from wan_train.media_out import write_image, write_video
from wan_train.models.variants import VARIANTS
from wan_train.sampling.encode import encode_images
from wan_train.sampling.grammar import GENERATOR, parse_line
from wan_train.sampling.request import preview_defaults

CPU = torch.device("cpu")
RNG = np.random.default_rng(5)
# Blocks of 8 x 8 equal pixels, so that a latent cell is a pixel of them.
CELLS = RNG.integers(0, 256, (13, 4, 6, 3), dtype=np.uint8)
VIDEO: NDArray[np.uint8] = CELLS.repeat(8, axis=1).repeat(8, axis=2)
LINE = "a --s 2 --d 1"


class Blocks:
    """Stands in for the VAE: latents are the pixels of every eighth row and column, of the first frame and each
    fourth one behind it, as 16 equal channels of red."""

    def encode(self, pixels: Tensor) -> Tensor:
        assert pixels.shape[1] == 3 and (pixels.shape[2] - 1) % 4 == 0
        return pixels[:, :1, ::4, ::8, ::8].expand(-1, 16, -1, -1, -1)


def built(task: str, line: str) -> dict[str, Tensor]:
    size = "" if "--w" in line else "--w 48 --h 32 "
    request = parse_line(f"{LINE} {size}{line}", preview_defaults(VARIANTS[task]), GENERATOR)
    made = encode_images(request, Blocks(), None, CPU)  # type: ignore[arg-type]
    assert isinstance(made, ImageConditions)
    return dict(made.extras)


def red(frames: NDArray[np.uint8]) -> Tensor:
    """The latents (F, H, W) that `Blocks` makes of frames."""
    return torch.from_numpy(frames[::4, ::8, ::8, 0].astype(np.float32)) / 127.5 - 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "video.mp4", VIDEO, fps=16, codec="lossless")
    write_video(tmp_path / "five.mp4", VIDEO[:5], fps=16, codec="lossless")
    write_image(tmp_path / "image.png", VIDEO[7])
    return tmp_path


@pytest.mark.parametrize("num_frames", [1, 5, 13])
def test_the_control_video_is_scaled_by_its_strength(num_frames: int, folder: Path) -> None:
    full = built("fun-control-14B", f"--f {num_frames} --cn video.mp4")["control_latents"]
    half = built("fun-control-14B", f"--f {num_frames} --cn video.mp4 --control_strength 0.5")["control_latents"]
    torch.testing.assert_close(full[3], red(VIDEO[:num_frames]), atol=0.02, rtol=0)
    assert full.shape == (16, 1 + (num_frames - 1) // 4, 4, 6) and torch.equal(half, full / 2)


def test_start_and_reference_are_latents_of_one_image(folder: Path) -> None:
    extras = built("fun-control-14B", "--f 5 --cn video.mp4 --i image.png --reference_image image.png")
    assert set(extras) == {"control_latents", "start_latents", "reference_latents"}
    for name in ("start_latents", "reference_latents"):
        torch.testing.assert_close(extras[name][0], red(VIDEO[7:8]))
    # Wan2.2's read the start image as image-to-video models do: 4 channels of mask before the latents.
    other = built("fun-control-A14B", "--f 5 --i image.png")["image_latents"]
    assert other.shape == (20, 2, 4, 6) and other[:4, 0].eq(1).all() and other[:4, 1].eq(0).all()


def test_camera_and_speed_need_no_vae(folder: Path) -> None:
    line = " ".join(map(str, camera_path("Left", 1)[0].tolist()))
    (folder / "camera.txt").write_text(f"{line}\n" * 13)
    by_file = built("fun-camera-14B", "--f 5 --i image.png --camera_path camera.txt")["camera"]
    assert torch.equal(by_file, read_camera_file(folder / "camera.txt")[:5])
    by_words = built("fun-camera-14B", "--f 5 --i image.png --camera_direction InLeft --camera_speed 0.5")["camera"]
    assert torch.equal(by_words, camera_path("InLeft", 5, 0.5))
    request = parse_line(f"{LINE} --motion_bucket_id 7", preview_defaults(VARIANTS["t2v-1.3B"]), GENERATOR)
    made = encode_images(request, None, None, CPU)
    assert made is not None and made.extras["motion_bucket_id"].item() == 7 and not request.is_from_pixels


def masks(context: Tensor) -> Tensor:
    """(F, H, W): the mask of each cell's first pixel."""
    return context[32]


def test_vace_without_inputs_is_grey_and_all_made_anew(folder: Path) -> None:
    context = built("vace-14B", "--f 5")["vace_context"]
    assert context.shape == (96, 2, 4, 6) and not context[:32].any() and context[32:].eq(1).all()
    request = parse_line(f"{LINE} --f 5 --vace_scale 0", preview_defaults(VARIANTS["vace-14B"]), GENERATOR)
    assert encode_images(request, None, None, CPU) is None


def test_vace_inpainting_keeps_what_is_black(folder: Path) -> None:
    mask = np.zeros((32, 48, 3), np.uint8)
    mask[:, 24:] = 255
    write_image(folder / "right.png", mask)
    context = built("vace-14B", "--f 5 --vace_video video.mp4 --vace_mask right.png")["vace_context"]
    wanted = red(VIDEO[:5])
    torch.testing.assert_close(context[0, ..., :3], wanted[..., :3], atol=0.02, rtol=0)
    torch.testing.assert_close(context[16, ..., 3:], wanted[..., 3:], atol=0.02, rtol=0)
    assert not context[0, ..., 3:].any() and not context[16, ..., :3].any()
    assert masks(context)[..., 3:].eq(1).all() and masks(context)[..., :3].eq(0).all()


def test_vace_extension_makes_what_comes_behind_the_video(folder: Path) -> None:
    """Black, and longer than the video: the five frames are kept, and what the mask says of later ones is white."""
    write_video(folder / "black.mp4", np.zeros((13, 32, 48, 3), np.uint8), fps=16, codec="lossless")
    context = built("vace-14B", "--f 13 --vace_video five.mp4 --vace_mask black.mp4")["vace_context"]
    assert context.shape == (96, 4, 4, 6)
    torch.testing.assert_close(context[0, :2], red(VIDEO[:5]), atol=0.02, rtol=0)
    assert not context[0, 2:].any() and not context[16].any()
    # Nearest-exact takes pixel frames 1, 4, 8 and 11 of 13 for the four latent ones.
    assert masks(context)[:2].eq(0).all() and masks(context)[2:].eq(1).all()


def test_vace_outpainting_makes_the_rim(folder: Path) -> None:
    line = "--f 5 --w 80 --h 48 --vace_video video.mp4 --vace_pad 8,16,24,0 --vace_reference image.png"
    context = built("vace-14B", line)["vace_context"]
    assert context.shape == (96, 3, 6, 10)
    torch.testing.assert_close(context[0, 1:, 2:6, 1:7], red(VIDEO[:5]), atol=0.02, rtol=0)
    inside = torch.zeros(6, 10, dtype=torch.bool)
    inside[2:6, 1:7] = True
    assert masks(context)[1:, inside].eq(0).all() and masks(context)[1:, ~inside].eq(1).all()
    assert not context[:32, 1:, ~inside].any()
    # The reference stands before the video, its mask and its reactive half are zeros.
    assert context[:16, 0].any() and not context[16:, 0].any()
