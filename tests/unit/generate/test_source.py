"""What a run begins with in place of noise."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from generate.jobs import make_jobs
from generate.source import fit_to_source, read_source
from tests.unit.generate.conftest import Given
from wan_train.errors import InputError
from wan_train.media_out import write_image, write_images, write_video
from wan_train.sampling.request import SampleRequest

# Each frame has a grey of its own.
FRAMES = np.stack([np.full((48, 64, 3), 12 * i, dtype=np.uint8) for i in range(20)])


@pytest.fixture
def request_(given: Given) -> SampleRequest:
    (job,) = make_jobs(given("--prompt", "a", "--video_length", 9))
    return job.request


def greys(pixels: torch.Tensor) -> list[int]:
    return ((pixels[0, 0, :, 16, 16] + 1) * 127.5).round().int().tolist()


def test_a_video_is_read_at_the_models_rate(request_: SampleRequest, tmp_path: Path) -> None:
    for fps, taken in ((16, range(0, 9)), (32, range(0, 18, 2))):
        path = tmp_path / f"{fps}.mp4"
        write_video(path, FRAMES, fps=fps, codec="lossless")
        wished = fit_to_source(replace(request_, video_path=str(path)), 16)
        assert wished.frames == 9
        pixels = read_source(wished, 16)
        assert pixels.shape == (1, 3, 9, 32, 32)
        assert greys(pixels) == [12 * i for i in taken]


def test_a_short_video_gives_a_short_one(request_: SampleRequest, tmp_path: Path) -> None:
    write_video(tmp_path / "s.mp4", FRAMES[:7], fps=16)
    assert fit_to_source(replace(request_, video_path=str(tmp_path / "s.mp4")), 16).frames == 5


def test_a_image_is_one_frame_and_a_folder_of_them_a_video(request_: SampleRequest, tmp_path: Path) -> None:
    write_image(tmp_path / "p.png", FRAMES[5])
    wished = fit_to_source(replace(request_, video_path=str(tmp_path / "p.png")), 16)
    assert wished.frames == 1 and greys(read_source(wished, 16)) == [60]
    write_images(tmp_path / "many", FRAMES)
    wished = fit_to_source(replace(request_, video_path=str(tmp_path / "many")), 16)
    assert wished.frames == 9 and greys(read_source(wished, 16)) == [12 * i for i in range(9)]


def test_what_does_not_read_is_refused(request_: SampleRequest, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.png").write_text("no image")
    for name in ("absent.mp4", "text.mp4", "text.png", "."):
        with pytest.raises(InputError):
            fit_to_source(replace(request_, video_path=str(tmp_path / name)), 16)
    assert fit_to_source(request_, 16) == request_


def test_a_video_may_have_any_name(request_: SampleRequest, tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", FRAMES, fps=16, codec="lossless")
    write_images(tmp_path / "mixed", FRAMES)
    (tmp_path / "mixed" / "v.mp4").write_bytes((tmp_path / "v.mp4").read_bytes())
    (tmp_path / "v.mp4").rename(tmp_path / "clip.ts")
    for name in ("clip.ts", "mixed"):
        wished = fit_to_source(replace(request_, video_path=str(tmp_path / name)), 16)
        assert wished.frames == 9 and greys(read_source(wished, 16)) == [12 * i for i in range(9)]


def test_frames_of_an_animation_that_last_no_time_last_a_tenth_of_a_second(
    request_: SampleRequest, tmp_path: Path
) -> None:
    first, *others = (Image.fromarray(frame) for frame in FRAMES)
    first.save(tmp_path / "a.webp", save_all=True, append_images=others, duration=0, lossless=True)
    wished = fit_to_source(replace(request_, video_path=str(tmp_path / "a.webp")), 16)
    assert greys(read_source(wished, 16)) == [12 * i for i in (0, 0, 1, 1, 2, 3, 3, 4, 5)]


def test_an_empty_name_is_none(request_: SampleRequest) -> None:
    assert fit_to_source(replace(request_, video_path=""), 16).frames == request_.frames
