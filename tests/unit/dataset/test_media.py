from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from dataset.media import probe, read_frames, read_image
from tests.unit.dataset.drawing import draw_image, draw_noise, draw_video, read_number
from wan_train.cli import InputError


def numbers(path, wanted):
    return [(index, read_number(picture)) for index, picture in read_frames(path, wanted)]


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
    whole, cut = draw_video(tmp_path / "whole.mp4", 30), tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w", options={"avoid_negative_ts": "disabled"}) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                shift = int(Fraction(10, 16) / stream.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                target.mux(packet)
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
