"""Images are 8-bit sRGB as they are shown, whichever reader they come through."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from dataset.reading.media import probe, read_frames
from dataset.reading.stills import read_image
from tests.unit.dataset.drawing import draw_image, make_profile
from wan_train.errors import InputError

RED = (255, 0, 0)
# Of Display P3 and of sRGB, adapted to D50, as their published profiles have them.
P3 = np.array([[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]])
SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])


def readers(folder: Path, path: Path) -> list[np.ndarray]:
    """An image as an image, as a video of one frame, and as a frame of a folder."""
    frames = folder / "frames"
    frames.mkdir()
    path.rename(frames / path.name)
    path = frames / path.name
    return [read_image(path), *(next(read_frames(each, {0}))[1] for each in (path, frames))]


def save_deep(path: Path, values: np.ndarray, kind: str) -> Path:
    Image.fromarray(values.astype(kind)).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "kind", "white"),
    [
        ("a.png", "uint16", 65535),
        ("a.tiff", "uint16", 65535),
        ("a.tiff", "int32", 65535),
        ("a.tiff", "float32", 1.0),
        ("a.pgm", "uint16", 65535),
    ],
)
def test_deep_greys_are_scaled_to_eight_bits(tmp_path, name, kind, white):
    values = np.linspace(0, 1, 64 * 48).reshape(48, 64) * white
    path = save_deep(tmp_path / name, values, kind)
    assert probe(path).reading == (("grey float",) if kind == "float32" else ("grey 16-bit",))
    for image in readers(tmp_path, path):
        assert image.shape == (48, 64, 3)
        assert np.abs(image[..., 0] - values / white * 255).max() <= 1


def test_deep_grey_is_the_bits_that_deep_rgb_is(tmp_path):
    cv2 = pytest.importorskip("cv2")
    values = np.arange(0, 65536, 7, dtype=np.uint16)[: 96 * 96].reshape(96, 96)
    cv2.imwrite(str(tmp_path / "grey.png"), values)
    cv2.imwrite(str(tmp_path / "rgb.png"), np.dstack([values] * 3))
    assert np.array_equal(read_image(tmp_path / "grey.png"), read_image(tmp_path / "rgb.png"))


@pytest.mark.parametrize(("values", "kind"), [([0, 70000], "int32"), ([-1, 5], "int32"), ([0, 255.0], "float32")])
def test_greys_out_of_range_are_refused_in_the_plan(tmp_path, values, kind):
    path = save_deep(tmp_path / "a.tiff", np.array([values]), kind)
    with pytest.raises(InputError, match=r"a\.tiff has grey values from .* outside 0 to"):
        probe(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_an_image_in_a_list_of_videos_is_turned(tmp_path, suffix):
    image = Image.new("RGB", (64, 32))
    image.paste((255, 255, 255), (0, 0, 32, 32))  # the left half
    tags = image.getexif()
    tags[0x0112] = 6  # to be turned to the right
    image.save(tmp_path / f"a.{suffix}", exif=tags)
    info = probe(tmp_path / f"a.{suffix}", with_times=True)
    assert (info.width, info.height, info.num_frames, info.reading) == (32, 64, 1, ("turned",))
    for image in readers(tmp_path, tmp_path / f"a.{suffix}"):
        assert image.shape == (64, 32, 3)
        assert image[:28].min() > 240 and image[36:].max() < 15


def test_an_image_has_no_second_frame(tmp_path):
    path = draw_image(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png ends before frame 3: it has 1"):
        list(read_frames(path, {0, 3}))


def to_srgb(rgb, colorants, gamma):
    linear = (np.array(rgb) / 255) ** gamma @ colorants @ np.linalg.inv(SRGB)
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


WITH_ALPHA = ("a.png", "a.webp", "a.tiff")


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "RGB") for name in (*WITH_ALPHA, "a.jpg")), *((name, "RGBA") for name in WITH_ALPHA)]
)
def test_profiles_are_converted_to_srgb(tmp_path, name, mode):
    image = Image.new(mode, (32, 32), (200, 120, 60, 255)[: len(mode)])
    options = {"lossless": True} if name == "a.webp" else {"quality": 100} if name == "a.jpg" else {}
    image.save(tmp_path / name, icc_profile=make_profile("Display P3", P3, 2.2), **options)
    assert probe(tmp_path / name).reading[0] == "profile Display P3"
    expected = to_srgb((200, 120, 60), P3, 2.2)
    assert np.abs(expected - (200, 120, 60)).max() > 8
    for image in readers(tmp_path, tmp_path / name):
        assert np.abs(image - expected).max() <= 3


def test_srgb_by_any_name_changes_nothing(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), None):
        Image.fromarray(values).save(tmp_path / "a.png", icc_profile=profile)
        assert probe(tmp_path / "a.png").reading == ()
        assert np.array_equal(read_image(tmp_path / "a.png"), values)


def test_a_broken_profile_is_ignored_with_one_warning(tmp_path, capsys):
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), (200, 120, 60)).save(path, icc_profile=b"no profile at all" * 20)
    assert probe(path).reading == ()
    assert read_image(path)[0, 0].tolist() == [200, 120, 60]
    assert capsys.readouterr().err == f"WARNING: {path}: its color profile cannot be read and is ignored\n"


def hide_red(mode: str) -> Image.Image:
    """Left half opaque grey, right half transparent with a colour hidden there."""
    image = Image.new("RGBA", (32, 16), (100, 100, 100, 255))
    image.paste((*RED, 0), (16, 0, 32, 16))
    if mode == "P":
        paletted = Image.new("P", (32, 16), 0)
        paletted.putpalette([100, 100, 100, *RED])
        paletted.paste(1, (16, 0, 32, 16))
        paletted.info["transparency"] = 1
        return paletted
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 20, 30)])
def test_transparency_is_composed_on_the_background(tmp_path, mode, background):
    path = tmp_path / "a.png"
    hide_red(mode).save(path)
    assert probe(path).reading == ("alpha",)
    image = read_image(path, background)
    assert image[0, 3].tolist() == [100, 100, 100]
    assert image[0, 20].tolist() == list(background)
    assert np.array_equal(next(read_frames(path, {0}, background))[1], image)
    alpha = read_image(path, None)
    assert alpha.shape == (16, 32, 3) and alpha[:, :16].min() == 255 and alpha[:, 16:].max() == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_an_alpha_that_is_opaque_is_read_as_none(tmp_path, mode):
    """So that caches of such images, which are many, stay what they are, whatever the background."""
    image = Image.new("RGBA", (32, 16), (100, 120, 140, 255)).convert(mode)
    image.save(tmp_path / "a.png", **({"transparency": 255} if mode == "P" else {}))
    with Image.open(tmp_path / "a.png") as written:
        assert written.has_transparency_data
    assert probe(tmp_path / "a.png").reading == ()
    (tmp_path / "frames").mkdir()
    for name in "ab":
        image.save(tmp_path / "frames" / f"{name}.png", **({"transparency": 255} if mode == "P" else {}))
    assert probe(tmp_path / "frames").reading == ("alpha",)  # nobody has looked at the other frames


def test_half_transparency_is_mixed_and_opaque_alpha_changes_no_bit(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    values[..., 3] = 255
    values[0, 0] = (200, 0, 0, 128)
    Image.fromarray(values).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image[0, 0].tolist() == [227, 127, 127]
    assert np.array_equal(image.reshape(-1, 3)[1:], values[..., :3].reshape(-1, 3)[1:])


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_transparent_animations_are_composed_too(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    images = [Image.new("RGBA", (32, 16), (0, 100 + 50 * i, 0, 255)) for i in range(3)]
    for image in images:
        image.paste((*RED, 0), (16, 0, 32, 16))
    options = {"lossless": True, "exact": True} if suffix == "webp" else {"disposal": 2}
    images[0].save(path, save_all=True, append_images=images[1:], duration=100, **options)
    assert probe(path).reading == ("alpha",)
    for index, image in read_frames(path, range(3), (0, 0, 255)):
        assert np.abs(image[0, 3].astype(int) - (0, 100 + 50 * index, 0)).max() <= 3
        assert image[0, 20].tolist() == [0, 0, 255]


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_frames_that_last_no_time_last_a_tenth_of_a_second(tmp_path, suffix):
    images = [Image.new("RGB", (32, 16), (60 * i, 0, 0)) for i in range(4)]
    images[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=images[1:], duration=0)
    info = probe(tmp_path / f"a.{suffix}", with_times=True)
    assert info.times == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_frames_of_a_gif_that_states_no_durations_are_all_read(tmp_path):
    noise = np.random.default_rng(3).integers(0, 256, (5, 64, 96, 3), dtype=np.uint8)  # FFmpeg reads it as one frame
    images = [Image.fromarray(each) for each in noise]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:])
    info = probe(tmp_path / "a.gif", with_times=True)
    assert info.times == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    for index, image in read_frames(tmp_path / "a.gif", range(5)):
        differences = [np.abs(image.astype(int) - each).mean() for each in noise]
        assert np.argmin(differences) == index
