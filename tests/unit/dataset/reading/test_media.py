from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from dataset.reading.media import probe, read_frames, read_image
from tests.unit.dataset.drawing import cut_video, draw_frame, draw_image, draw_noise, draw_video, read_number
from wan_train.errors import InputError


def numbers(path, wanted):
    return [(index, read_number(image)) for index, image in read_frames(path, wanted)]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mov", "mpeg4"), ("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4")],
)
def test_headers_and_frames_of_containers(tmp_path, name, codec):
    path = draw_video(tmp_path / name, 37, fps=24, codec=codec, options={"b": "2000000"} if codec != "libx264" else {})
    info = probe(path)
    assert (info.width, info.height, info.num_frames) == (64, 48, 37)
    assert info.fps == pytest.approx(24, rel=0.01)
    assert numbers(path, {36, 0, 17}) == [(0, 0), (17, 17), (36, 36)]


def test_frames_that_an_edit_list_cuts_away_do_not_count(tmp_path):
    cut = cut_video(draw_video(tmp_path / "whole.mp4", 30), tmp_path / "cut.mp4", Fraction(10, 16))
    assert probe(cut).num_frames == 20
    assert numbers(cut, range(20)) == [(i, i + 10) for i in range(20)]


def halve(path, start=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * start)])


def test_only_what_is_needed_is_decoded(tmp_path):
    path = draw_video(tmp_path / "a.mp4", 60, size=(256, 192), options={"g": "10", "crf": "1"})
    halve(path, 0.6)
    assert numbers(path, [0, 5]) == [(0, 0), (5, 5)]


def test_a_cut_off_video_is_named(tmp_path):
    path = draw_video(tmp_path / "cut.mp4", 60, size=(256, 192), options={"g": "10", "crf": "1"})
    halve(path, 0.6)
    with pytest.raises(InputError, match=r"cut\.mp4"):
        numbers(path, [0, 59])
    late = draw_video(tmp_path / "headless.mov", 60)  # its index is at the end
    halve(late)
    with pytest.raises(InputError, match=r"headless\.mov"):
        probe(late)


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_video_is_named(tmp_path, seed):
    path = draw_video(tmp_path / "bad.mp4", 30, size=(256, 192), draw=draw_noise)
    data = bytearray(path.read_bytes())
    noise = np.random.default_rng(seed)
    start = int(noise.integers(len(data) // 4, len(data) - 2000))
    data[start : start + 400] = noise.bytes(400)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"bad\.mp4"):
        numbers(path, [29])


@pytest.mark.parametrize("content", [b"", b"not a video at all" * 50])
def test_what_is_no_video_is_named(tmp_path, content):
    path = tmp_path / "text.mp4"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"text\.mp4"):
        probe(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "avif"])
def test_images_of_every_format(tmp_path, suffix):
    path = draw_image(tmp_path / f"a.{suffix}", (40, 24))
    assert (probe(path).width, probe(path).height, probe(path).num_frames) == (40, 24, 1)
    rgb = read_image(path)
    assert rgb.shape == (24, 40, 3)
    assert np.abs(rgb.astype(int) - (200, 100, 50)).max() <= 6


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1"])
def test_images_of_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / "a.png"
    Image.new(mode, (40, 24)).save(path)
    assert read_image(path).shape == (24, 40, 3)


def test_a_cut_off_image_is_named(tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    halve(path)
    with pytest.raises(InputError, match=r"cut\.png"):
        read_image(path)
    path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cut\.png"):
        probe(path)


@pytest.mark.parametrize("turned", [0, 90, 180, 270])
def test_videos_are_shown_the_way_up_that_they_say(tmp_path, turned):
    def draw(number, width, height):
        image = np.zeros((height, width, 3), np.uint8)
        image[: height // 4, : width // 4] = 255  # white in the upper left corner
        return image

    path = draw_video(tmp_path / "a.mp4", 2, size=(64, 32), draw=draw, turned=turned)
    info = probe(path)
    assert (info.width, info.height) == ((32, 64) if turned % 180 else (64, 32))
    ((_, image),) = read_frames(path, [0])
    assert image.shape == (info.height, info.width, 3)
    # A quarter turn to the left takes the upper left corner to the lower left.
    corner = {0: (2, 2), 90: (-3, 2), 180: (-3, -3), 270: (2, -3)}[turned]
    assert image[corner].min() > 200
    assert image.mean() < 40


def test_images_are_shown_the_way_up_that_they_say(tmp_path):
    image = Image.new("RGB", (40, 24))
    image.putpixel((0, 0), (255, 255, 255))
    tags = image.getexif()
    tags[0x0112] = 6  # to be turned to the right
    image.save(tmp_path / "a.png", exif=tags)
    assert (probe(tmp_path / "a.png").width, probe(tmp_path / "a.png").height) == (24, 40)
    image = read_image(tmp_path / "a.png")
    assert image.shape == (40, 24, 3)
    assert image[0, -1].min() == 255


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "size"),
    [
        ("odd.mkv", "ffv1", "yuv444p", (67, 49)),
        ("odd420.mkv", "ffv1", "yuv420p", (67, 49)),
        ("deep.mkv", "ffv1", "yuv420p10le", (64, 48)),
        ("alpha.mov", "png", "rgba", (64, 48)),
    ],
)
def test_unusual_images_are_decoded(tmp_path, name, codec, pix_fmt, size):
    path = draw_video(tmp_path / name, 6, size=size, codec=codec, pix_fmt=pix_fmt)
    assert (probe(path).width, probe(path).height, probe(path).num_frames) == (*size, 6)
    assert numbers(path, range(6)) == [(i, i) for i in range(6)]
    assert next(read_frames(path, [0]))[1].shape == (size[1], size[0], 3)


def test_ten_bits_keep_their_grey(tmp_path):
    path = draw_video(
        tmp_path / "a.mkv",
        1,
        codec="ffv1",
        pix_fmt="yuv420p10le",
        draw=lambda number, width, height: np.full((height, width, 3), 100, np.uint8),
    )
    assert np.abs(next(read_frames(path, [0]))[1].astype(int) - 100).max() <= 2


def test_a_sound_track_changes_nothing(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        sound, stream = container.add_stream("aac", rate=48000), container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(8):
            frame = av.VideoFrame.from_ndarray(draw_frame(number), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 16)
            container.mux(stream.encode(frame))
        for start in range(0, 48000, 1024):
            noise = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
            noise.pts, noise.sample_rate = start, 48000
            container.mux(sound.encode(noise))
        container.mux([*stream.encode(), *sound.encode()])
    assert probe(path, with_times=True).times == pytest.approx([i / 16 for i in range(9)])
    assert numbers(path, range(8)) == [(i, i) for i in range(8)]


def test_frames_that_are_never_shown_do_not_count(tmp_path):
    path = draw_video(
        tmp_path / "a.webm", 40, codec="libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "16", "b": "200k"}
    )
    assert probe(path).num_frames == 40
    assert [index for index, _ in read_frames(path, range(40))] == list(range(40))


def test_a_folder_of_frames_is_sorted_by_number_and_of_one_size(tmp_path):
    for number in (0, 2, 10, 9):
        Image.fromarray(draw_frame(number)).save(tmp_path / f"shot{number}.png")
    assert (probe(tmp_path).num_frames, probe(tmp_path).fps) == (4, 16)
    assert [found for _, found in numbers(tmp_path, range(4))] == [0, 2, 9, 10]
    draw_image(tmp_path / "shot11.png", (32, 32))
    with pytest.raises(InputError, match=r"shot11\.png differs in size"):
        numbers(tmp_path, [4])
    with pytest.raises(InputError, match="contains no images"):
        (tmp_path / "none").mkdir()
        probe(tmp_path / "none")


def test_side_data_that_has_no_name_is_passed_over(tmp_path):
    """ffmpeg hands on the EXIF data of a TIFF, for which PyAV has no name yet."""
    draw_image(tmp_path / "a.tiff")
    assert (probe(tmp_path / "a.tiff").width, probe(tmp_path / "a.tiff").height) == (64, 48)
    assert len(list(read_frames(tmp_path / "a.tiff", {0}))) == 1
