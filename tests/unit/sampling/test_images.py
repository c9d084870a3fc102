"""Images that videos begin and end with: the sizes that they lead to, and how they are brought there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.batching.buckets import resize_to_bucket
from wan_train.models.variants import VARIANTS
from wan_train.sampling.grammar import parse_line, parse_table
from wan_train.sampling.images import load_images, size_like
from wan_train.sampling.request import SampleRequest, preview_defaults


def image(folder: Path, width: int, height: int) -> str:
    path = folder / f"{width}x{height}.png"
    colours = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(colours).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("source", "asked", "wanted"),
    [
        ((832, 480), (832, 480), (832, 480)),
        ((1664, 960), (832, 480), (832, 480)),
        ((480, 832), (832, 480), (480, 832)),
        ((1280, 720), (1280, 720), (1280, 720)),
        ((1920, 1080), (832, 480), (832, 464)),  # 842.6 x 473.9
        ((1000, 1000), (832, 480), (624, 624)),  # 631.9
        ((1280, 720), (832, 480), (832, 464)),
        ((900, 30), (64, 64), (336, 16)),  # 350.5 x 11.7: no side is below 16
    ],
)
def test_a_video_has_the_images_proportions(
    source: tuple[int, int], asked: tuple[int, int], wanted: tuple[int, int], tmp_path: Path
) -> None:
    assert size_like(image(tmp_path, *source), asked, VARIANTS["i2v-14B"]) == wanted


@pytest.mark.parametrize(
    ("source", "asked", "wanted"),
    [
        ((1280, 704), (1280, 704), (1280, 704)),
        ((704, 1280), (1280, 704), (704, 1280)),
        ((1920, 1080), (1280, 704), (1248, 704)),  # 1265.6 x 711.9: 1248 leaves 704, and 704 leaves 1280
        ((1000, 1000), (1280, 704), (928, 960)),  # 949.3
    ],
)
def test_the_5b_takes_the_nearer_of_two_ways(
    source: tuple[int, int], asked: tuple[int, int], wanted: tuple[int, int], tmp_path: Path
) -> None:
    assert size_like(image(tmp_path, *source), asked, VARIANTS["ti2v-5B"]) == wanted


def request(line: str, task: str = "i2v-14B") -> SampleRequest:
    return parse_line(line, preview_defaults(VARIANTS[task]))


def test_the_official_shift_goes_by_the_size(tmp_path: Path) -> None:
    first = image(tmp_path, 832, 480)
    assert request(f"a --w 832 --h 480 --i {first}").noise_shift == 3.0
    assert request(f"a --w 1280 --h 720 --i {first}").noise_shift == 5.0
    assert request(f"a --w 832 --h 480 --i {first} --fs 7").noise_shift == 7.0
    assert request(f"a --w 832 --h 480 --i {first} --ei {first}", "flf2v-14B").noise_shift == 16.0
    assert request("a --w 832 --h 480", "t2v-14B").noise_shift == 5.0


def test_an_exact_size_crops_the_image(tmp_path: Path) -> None:
    first = image(tmp_path, 80, 120)
    assert (request(f"a --w 96 --h 64 --i {first}").width, request(f"a --w 96 --h 64 --i {first}").height) == (64, 96)
    exact = request(f"a --w 96 --h 64 --i {first} --exact_size")
    assert (exact.width, exact.height) == (96, 64)
    (pixels,) = load_images(exact.image_paths, (96, 64))
    wanted = resize_to_bucket(np.asarray(Image.open(first)), (96, 64))
    assert torch.equal(pixels, torch.from_numpy(wanted).permute(2, 0, 1).float() / 127.5 - 1)


def test_controls_of_one_frame(tmp_path: Path) -> None:
    first, second = image(tmp_path, 64, 48), image(tmp_path, 48, 64)
    line = request(f"a --w 64 --h 48 --f 5 --of control_index=0;9,target_index=4 --ci {first} --ci {second}")
    table = parse_table(
        {
            "prompt": "a",
            "width": 64,
            "height": 48,
            "one_frame": "control_index=0;9,target_index=4",
            "control_image_path": [first, second],
        },
        preview_defaults(VARIANTS["i2v-14B"]),
    )
    assert line == table
    assert (line.frames, line.latent_shape, line.image_paths) == (1, (16, 3, 6, 8), (first, second))
