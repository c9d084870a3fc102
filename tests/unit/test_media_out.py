"""Videos and pictures with a comment, in every codec."""

from pathlib import Path

import av
import numpy as np
import pytest

from generate.settings import CODEC_NAMES
from wan_train.cli import InputError
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


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_a_lower_rate_factor_is_a_bigger_file(codec: str, tmp_path: Path) -> None:
    for quality in (5, 45):
        write_video(tmp_path / f"{quality}.mp4", FRAMES, fps=16, codec=codec, quality=quality)
    assert (tmp_path / "5.mp4").stat().st_size > 2 * (tmp_path / "45.mp4").stat().st_size


def test_pictures_carry_a_comment_and_folders_that_of_their_pictures(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", FRAMES[0], comment=COMMENT)
    write_images(tmp_path / "many", FRAMES, comment=COMMENT)
    assert read_comment(tmp_path / "a.png") == read_comment(tmp_path / "many") == COMMENT
    write_image(tmp_path / "b.png", FRAMES[0])
    assert read_comment(tmp_path / "b.png") is None
    assert read_comment(tmp_path) == COMMENT


def test_an_unknown_codec_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="h264, vp9, lossless"):
        write_video(tmp_path / "a.mp4", FRAMES, fps=16, codec="av2")


def test_pictures_of_a_longer_video_before_do_not_stay(tmp_path: Path) -> None:
    write_images(tmp_path / "many", FRAMES)
    (tmp_path / "many" / "mine.png").write_bytes(b"")
    write_images(tmp_path / "many", FRAMES[:2])
    assert {path.name for path in (tmp_path / "many").iterdir()} == {"many_000.png", "many_001.png", "mine.png"}
