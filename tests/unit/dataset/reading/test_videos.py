"""Videos are read as players show them, and the plan promises no frame that does not decode."""

from fractions import Fraction

import av
import numpy as np
import pytest

from dataset.reading import videos
from dataset.reading.media import probe, read_frames
from dataset.reading.tone import to_sdr
from tests.unit.dataset.drawing import cut_at_key, cut_video, draw_image, draw_video, read_number

OPEN_GROUPS = {"x264-params": "open-gop=1:scenecut=0:keyint=12:min-keyint=12:b-adapt=0:bframes=3"}


def draw_corner(number, width, height):
    """White in the upper left quarter."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2] = 255
    return image


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize(
    ("aspect", "width"), [(Fraction(64, 45), 91), (Fraction(203, 639), 20), (Fraction(2), 128), (Fraction(1), 64)]
)
def test_pixels_are_shown_square(tmp_path, suffix, aspect, width):
    path = draw_video(tmp_path / f"a.{suffix}", 3, draw=draw_corner, aspect=aspect)
    info = probe(path)
    assert (info.width, info.height) == (width, 48)
    assert info.reading == ((f"pixels {aspect.numerator}:{aspect.denominator}",) if aspect != 1 else ())
    for _, image in read_frames(path, range(3)):
        assert image.shape == (48, width, 3)
        assert image[:20, : width // 2 - 3].min() > 200 and image[:, width // 2 + 3 :].max() < 50


def test_pixels_are_made_square_before_the_image_is_turned(tmp_path):
    path = draw_video(tmp_path / "a.mp4", 2, draw=draw_corner, aspect=Fraction(2), turned=90)
    info = probe(path)
    assert (info.width, info.height) == (48, 128)
    ((_, image),) = read_frames(path, [0])
    assert image.shape == (128, 48, 3)
    # A quarter turn to the left takes the upper left quarter to the lower left.
    assert image[70:, :20].min() > 200 and image[:60].max() < 50


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mkv", "libx264", OPEN_GROUPS),
        ("avi", "libx264", OPEN_GROUPS),
        ("ts", "libx264", OPEN_GROUPS),
        ("mp4", "libx264", OPEN_GROUPS),
        ("mpg", "mpeg2video", {"g": "12", "bf": "2"}),
        ("avi", "mpeg4", {"g": "12", "bf": "2"}),
    ],
)
def test_frames_that_do_not_decode_are_not_promised(tmp_path, suffix, codec, options):
    whole = draw_video(tmp_path / f"whole.{suffix}", 43, fps=25, codec=codec, options=options)
    assert (probe(whole).num_frames, probe(whole).lost_frames) == (43, 0)
    cut = cut_at_key(whole, tmp_path / f"cut.{suffix}")
    info = probe(cut, with_times=True)
    assert info.num_frames == 31 and probe(cut).num_frames == 31
    # In MP4 an edit list says that they are not shown.
    assert bool(info.lost_frames) == (suffix != "mp4")
    assert info.times == pytest.approx([i / 25 for i in range(32)], abs=2e-3)
    found = [read_number(image) for _, image in read_frames(cut, range(info.num_frames))]
    assert found == list(range(12, 43))


def test_whole_videos_are_not_decoded_to_be_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "_decode_seconds", None)
    for name, codec, options in (
        ("a.mp4", "libx264", OPEN_GROUPS),
        ("a.mkv", "libx264", {"bf": "3"}),
        ("a.mpg", "mpeg2video", {"g": "12", "bf": "2"}),
        ("b.avi", "mpeg4", {}),
        ("c.webm", "libvpx", {"b": "200k"}),
    ):
        path = draw_video(tmp_path / name, 30, fps=25, codec=codec, options=options)
        assert probe(path).num_frames == probe(path, with_times=True).num_frames == 30
    # An edit list that begins within a group: what is before it decodes, and is not shown.
    cut = cut_video(draw_video(tmp_path / "whole.mp4", 30), tmp_path / "cut.mp4", Fraction(10, 16))
    assert probe(cut).num_frames == 20


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_hdr_is_tone_mapped_and_told(tmp_path, suffix, transfer, name):
    def draw(number, width, height):
        return np.full((height, width, 3), 148, np.uint8)  # 58% of the signal: in PQ white at 203 cd/m2

    path = draw_video(tmp_path / f"a.{suffix}", 2, pix_fmt="yuv420p10le", transfer=transfer, draw=draw)
    assert probe(path).reading == (f"hdr {name}",)
    ((_, image),) = read_frames(path, [0])
    ((_, plain),) = read_frames(
        draw_video(tmp_path / f"b.{suffix}", 2, pix_fmt="yuv420p10le", transfer=1, draw=draw), [0]
    )
    assert probe(tmp_path / f"b.{suffix}").reading == ()
    expected = to_sdr(plain.astype(np.uint16) * 257, transfer, 9)
    assert np.abs(image.astype(int) - expected).max() <= 4
    assert abs(plain.mean() - 148) < 3 < abs(image.mean() - 148)


def test_side_data_that_has_no_name_is_passed_over(tmp_path):
    """ffmpeg hands on the EXIF data of a TIFF, for which PyAV has no name yet."""
    path = draw_image(tmp_path / "a.tiff")
    assert (videos.probe_video(path, with_times=False).width, len(list(videos.decode_frames(path, {0})))) == (64, 1)


@pytest.mark.skipif("libvpx-vp9" not in av.codecs_available, reason="PyAV was built without libvpx")
@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_transparency_of_webm_is_composed(tmp_path, codec):
    image = np.zeros((48, 64, 4), np.uint8)
    image[:, :32] = (200, 0, 0, 255)
    image[:, 32:] = (0, 255, 0, 0)  # a colour that is hidden
    with av.open(str(tmp_path / "a.webm"), "w") as container:
        stream = container.add_stream(codec, rate=16, options={"auto-alt-ref": "0", "crf": "4", "b": "4M"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuva420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgba").reformat(format="yuva420p")))
        container.mux(stream.encode())
    info = probe(tmp_path / "a.webm", with_times=True)
    assert (info.num_frames, info.reading) == (5, ("alpha",))
    found = dict(read_frames(tmp_path / "a.webm", range(5), (0, 0, 255)))
    assert len(found) == 5
    for shown in found.values():
        assert np.abs(shown[24, 16].astype(int) - (200, 0, 0)).max() < 12
        assert np.abs(shown[24, 48].astype(int) - (0, 0, 255)).max() < 12
