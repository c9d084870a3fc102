"""Videos and images with a comment, in every codec."""

from pathlib import Path

import av
import numpy as np
import pytest

from generate.settings import CODEC_NAMES
from wan_train.errors import InputError
from wan_train.media_out import CODECS, read_comment, write_image, write_images, write_video

COMMENT = '{"prompt": "ein Kätzchen, 色调艳丽", "list": [1, 2]}'
FRAMES = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), dtype=np.uint8)


def test_the_command_line_offers_what_the_table_holds() -> None:
    assert set(CODEC_NAMES) == set(CODECS)


def read(path: Path) -> tuple[np.ndarray, str]:
    with av.open(str(path)) as container:
        name = container.streams.video[0].codec_context.name
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), name


@pytest.mark.parametrize(("codec", "stored"), [("h264", "h264"), ("vp9", "vp9"), ("lossless", "h264")])
def test_a_video_is_what_was_given_and_the_same_bytes_every_time(codec: str, stored: str, tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, FRAMES, fps=16, codec=codec, comment=COMMENT)
    frames, name = read(tmp_path / "a.mp4")
    assert name == stored and frames.shape == FRAMES.shape
    assert np.array_equal(frames, FRAMES) == (codec == "lossless")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert read_comment(tmp_path / "a.mp4") == COMMENT


@pytest.mark.parametrize(("codec", "runs"), [("h264", 20), ("vp9", 3), ("lossless", 3)])
def test_noisy_clips_give_the_same_bytes_every_time(codec: str, runs: int, tmp_path: Path) -> None:
    """Moving texture under noise, long enough for B-frames: with macroblock trees x264 made several files of it."""
    random = np.random.default_rng(0)
    texture = random.integers(0, 255, (64, 64, 3))
    moving = np.stack([np.roll(texture, shift, axis=1) for shift in range(33)])
    frames = (moving // 2 + random.integers(0, 128, moving.shape)).astype(np.uint8)
    written, between = set(), []
    for run in range(runs):
        between.append(random.bytes(7000 * run))  # so that no two encoders find the same memory
        write_video(tmp_path / "a.mp4", frames, fps=16, codec=codec)
        written.add((tmp_path / "a.mp4").read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("codec", ["h264", "vp9"])
@pytest.mark.parametrize("size", [(64, 64), (592, 64)])
def test_a_video_is_bt709_and_says_so(codec: str, size: tuple[int, int], tmp_path: Path) -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [30, 200, 120]], dtype=np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (4, *size, 3))
    write_video(tmp_path / "a.mp4", frames, fps=16, codec=codec, quality=1)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        assert tags == (1, 1, 1, 1)  # three times BT.709, and limited range
        decoded = [frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)]
    for colour, planes in zip(colours / 255.0, decoded, strict=True):
        luma = colour @ (0.2126, 0.7152, 0.0722)
        wanted = (
            16 + 219 * luma,
            128 + 224 * (colour[2] - luma) / 1.8556,
            128 + 224 * (colour[0] - luma) / 1.5748,
        )
        height = size[0]
        found = planes[height // 2, 9], planes[height * 9 // 8, 9], planes[height * 11 // 8, 9]
        assert np.allclose(found, wanted, atol=2), (colour, found, wanted)
    frames_back, _ = read(tmp_path / "a.mp4")
    assert np.abs(frames_back.astype(int) - frames).max() <= 4  # a reader that heeds the tags; 8 bits twice


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_a_lower_rate_factor_is_a_bigger_file(codec: str, tmp_path: Path) -> None:
    for quality in (5, 45):
        write_video(tmp_path / f"{quality}.mp4", FRAMES, fps=16, codec=codec, quality=quality)
    assert (tmp_path / "5.mp4").stat().st_size > 2 * (tmp_path / "45.mp4").stat().st_size


def test_images_carry_a_comment_and_folders_that_of_their_images(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", FRAMES[0], comment=COMMENT)
    write_images(tmp_path / "many", FRAMES, comment=COMMENT)
    assert read_comment(tmp_path / "a.png") == read_comment(tmp_path / "many") == COMMENT
    write_image(tmp_path / "b.png", FRAMES[0])
    assert read_comment(tmp_path / "b.png") is None
    assert read_comment(tmp_path) == COMMENT


def test_an_unknown_codec_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="h264, vp9, lossless"):
        write_video(tmp_path / "a.mp4", FRAMES, fps=16, codec="av2")


def test_images_of_a_longer_video_before_do_not_stay(tmp_path: Path) -> None:
    write_images(tmp_path / "many", FRAMES)
    (tmp_path / "many" / "mine.png").write_bytes(b"")
    write_images(tmp_path / "many", FRAMES[:2])
    assert {path.name for path in (tmp_path / "many").iterdir()} == {"many_000.png", "many_001.png", "mine.png"}
