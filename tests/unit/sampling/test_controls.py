"""Control options of a prompt: what is refused, and how long and large they make the video."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wan_train.errors import InputError
from wan_train.media_out import write_image, write_images, write_video
from wan_train.models.variants import VARIANTS
from wan_train.sampling.control_settings import ControlOptions
from wan_train.sampling.grammar import GENERATOR, parse_line, parse_table
from wan_train.sampling.request import SampleRequest, preview_defaults

CAMERA_LINE = "0 0.5 0.9 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with videos of 9 and 22 frames, an image, files that do not read, and a camera of 7 frames."""
    monkeypatch.chdir(tmp_path)
    frames = np.full((22, 64, 96, 3), 90, dtype=np.uint8)
    write_video(tmp_path / "nine.mp4", frames[:9], fps=16)
    write_video(tmp_path / "long.mp4", frames, fps=16)
    write_images(tmp_path / "folder", frames[:6])
    write_image(tmp_path / "image.png", frames[0])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "camera.txt").write_text("https://a.video\n" + f"{CAMERA_LINE}\n" * 7)
    (tmp_path / "short.txt").write_text("0 1 2\n3 4 5\n")
    return tmp_path


def read(task: str, line: str) -> SampleRequest:
    size = "" if "--w" in line else "--w 96 --h 64 "
    return parse_line(f"a cat --f 17 {size}{line}", preview_defaults(VARIANTS[task]), GENERATOR)


@pytest.mark.parametrize(
    ("task", "line", "told"),
    [
        (
            "t2v-14B",
            "--cn nine.mp4",
            r"--control_path \(--cn\): --task t2v-14B does not take a control video: use a fun",
        ),
        ("vace-14B", "--cn nine.mp4", r"--control_path \(--cn\)"),
        ("vace-14B", "--reference_image image.png", "--reference_image: --task vace-14B does not take a reference"),
        ("vace-14B", "--i image.png", "generates from its VACE inputs"),
        ("fun-control-14B", "--vace_video nine.mp4", "--vace_video: .* use a vace task, or leave it out"),
        ("fun-control-14B", "--vace_reference image.png", "--vace_reference: "),
        ("fun-control-14B", "--vace_scale 0.5", "--vace_scale: --task fun-control-14B is not a vace task"),
        ("t2v-14B", "--control_end 0.5", "--control_start and --control_end: --task t2v-14B"),
        (
            "fun-camera-14B",
            "--i image.png --camera_direction Left --control_end 0.5",
            "--control_start and --control_end",
        ),
        ("i2v-14B", "--i image.png --camera_direction Left", "--camera_direction: .* use a fun-camera task"),
        ("fun-camera-14B", "--i image.png", "requires a camera path: give --camera_direction or --camera_path"),
        ("fun-camera-14B", "--camera_direction Left", "requires a first-frame image"),
        ("fun-camera-14B", "--i image.png --camera_direction Sideways", "choose from Left, Right, Up"),
        ("fun-camera-14B", "--i image.png --camera_direction In --camera_path camera.txt", "give one of them"),
        (
            "fun-camera-14B",
            "--i image.png --camera_path camera.txt --camera_speed 1",
            "--camera_speed and --camera_path",
        ),
        ("t2v-14B", "--camera_speed 0.1", "--camera_speed requires --camera_direction: give both, or leave out"),
        (
            "fun-camera-14B",
            f"--i image.png --camera_origin {','.join(CAMERA_LINE.split())}",
            "camera_origin requires --camera_direction",
        ),
        ("fun-camera-14B", "--i image.png --camera_direction In --camera_origin 1,2", "must be 19 numbers"),
        ("vace-1.3B", "--camera_speed 0.5", "--camera_speed requires --camera_direction: give both, or leave out"),
        ("fun-camera-14B", "--i image.png --camera_path short.txt", r"--camera_path: short.txt, line 1: .*19 numbers"),
        ("fun-camera-14B", "--i image.png --camera_path absent.txt", "--camera_path absent.txt: no such file"),
        ("fun-control-14B", "--control_start 0.5 --control_end 0.5", "--control_start 0.5 must be less than"),
        ("fun-control-14B", "--control_strength 0.5", "--control_strength requires --control_path"),
        ("fun-control-14B", "--cn nine.mp4 --control_strength 11", "0 to 10"),
        ("fun-control-14B", "--cn absent.mp4", "--control_path absent.mp4: no such file"),
        ("fun-control-14B", "--cn text.mp4", "--control_path: text.mp4"),
        ("fun-control-14B", "--reference_image text.png", "--reference_image text.png"),
        ("fun-control-14B", "--ei image.png", "takes only a first-frame image"),
        (
            "fun-control-14B",
            "--of control_index=0,target_index=1 --ci image.png",
            "--task fun-control-14B does not support it",
        ),
        ("i2v-14B-FC", "--cn nine.mp4", "requires a first-frame image"),
        ("vace-14B", "--vace_mask image.png", "--vace_mask requires --vace_video: give both"),
        ("vace-14B", "--vace_pad 16", "--vace_pad requires --vace_video"),
        ("vace-14B", "--vace_video nine.mp4 --vace_pad 1,2", "must be LEFT,TOP,RIGHT,BOTTOM"),
        ("vace-14B", "--vace_video nine.mp4 --vace_pad -5", "must be LEFT,TOP,RIGHT,BOTTOM"),
        ("vace-14B", "--vace_video nine.mp4 --vace_pad 32", "32,32,32,32 covers the whole 96x64 video"),
        ("vace-14B", "--vace_video nine.mp4 --vace_mask text.png", "--vace_mask text.png"),
        ("vace-14B", "--vace_reference image.png --vace_reference absent.png", "--vace_reference absent.png: no such"),
        ("t2v-1.3B", "--motion_bucket_id 101", "0 to 100"),
        ("vace-14B", "--motion_bucket_id 5", "--motion_bucket_id: --task vace-14B has no motion controller"),
    ],
)
def test_what_cannot_be_is_refused(task: str, line: str, told: str, folder: Path) -> None:
    with pytest.raises(InputError, match=told):
        read(task, line)


@pytest.mark.parametrize(
    ("task", "line", "frames", "told"),
    [
        ("fun-control-14B", "--cn nine.mp4", 9, "nine.mp4 has 9 frames: generating 9"),
        ("fun-control-14B", "--cn long.mp4", 17, ""),
        ("fun-control-14B", "--cn folder", 5, "folder has 6 frames: generating 5"),
        ("fun-control-14B", "--cn image.png", 1, "image.png has 1 frame: generating 1"),
        ("fun-camera-14B", "--i image.png --camera_path camera.txt", 5, "camera.txt has 7 frames: generating 5"),
        ("vace-14B", "--vace_video nine.mp4 --cim image.png", 9, "nine.mp4 has 9 frames: generating 9"),
        ("vace-14B", "--vace_video nine.mp4 --vace_mask long.mp4", 17, ""),
        ("vace-14B", "--vace_video long.mp4 --vace_mask nine.mp4", 9, "nine.mp4 has 9 frames: generating 9"),
        ("vace-14B", "--vace_reference image.png", 17, ""),
    ],
)
def test_controls_decide_the_length(
    task: str, line: str, frames: int, told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read(task, line).frames == frames
    said = capsys.readouterr().err
    assert told in said and ("generating" in said) is bool(told)


def test_other_sizes_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read("fun-control-14B", "--cn nine.mp4")
    assert "scaled" not in capsys.readouterr().err
    read("fun-control-14B", "--cn nine.mp4 --w 64 --h 64")
    assert "nine.mp4 is 96x64: scaled and cropped to 64x64" in capsys.readouterr().err
    read("vace-14B", "--vace_video nine.mp4 --vace_pad 8,0,8,0")
    assert "nine.mp4 is 96x64: scaled and cropped to 80x64" in capsys.readouterr().err


def test_a_control_task_without_a_control_is_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read("fun-control-14B", "")
    assert "without --control_path (--cn)" in capsys.readouterr().err


def test_a_window_without_steps_is_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read("fun-control-14B", "--cn nine.mp4 --s 4 --control_end 0.2")
    assert "include none of 4 steps" in capsys.readouterr().err


def test_every_option_has_its_names(folder: Path) -> None:
    line = read("vace-14B", "--vace_video nine.mp4 --cim image.png --vace_pad 8 --vace_reference image.png")
    assert (line.vace_mask, line.vace_pad, line.vace_reference) == ("image.png", (8, 8, 8, 8), ("image.png",))
    table = {"prompt": "a", "control_video_path": "nine.mp4", "control_strength": 0.5, "reference_image": "image.png"}
    made = parse_table(table, preview_defaults(VARIANTS["fun-control-14B"]))
    assert (made.control_path, made.control_strength, made.reference_image) == ("nine.mp4", 0.5, "image.png")
    assert parse_table({"prompt": "a", "control_path": "nine.mp4"}, preview_defaults(VARIANTS["t2v-14B-FC"])) == (
        parse_table({"prompt": "a", "cn": "nine.mp4"}, preview_defaults(VARIANTS["fun-control-14B"]))
    )
    origin = ",".join(CAMERA_LINE.split())
    camera = read("fun-camera-14B", f"--i image.png --camera_direction LeftUp --camera_origin {origin}")
    assert camera.camera_origin == tuple(map(float, CAMERA_LINE.split()))


def test_what_a_line_says_of_the_camera_takes_the_place_of_what_holds_for_all(folder: Path) -> None:
    by_file = read("fun-camera-14B", "--i image.png --camera_path camera.txt")
    by_direction = parse_line("a dog --camera_direction In", by_file, GENERATOR)
    assert (by_direction.camera_direction, by_direction.camera_path) == ("In", None)
    again = parse_line("a dog --camera_path camera.txt", by_direction, GENERATOR)
    assert (again.camera_direction, again.camera_path) == (None, "camera.txt")


def test_a_camera_file_in_a_line_takes_the_place_of_a_speed_that_holds_for_all(folder: Path) -> None:
    faster = replace(preview_defaults(VARIANTS["fun-camera-14B"]), camera_speed=0.1)
    made = parse_line("a cat --f 5 --w 96 --h 64 --i image.png --camera_path camera.txt", faster, GENERATOR)
    assert (made.camera_path, made.camera_speed) == ("camera.txt", ControlOptions.camera_speed)
    told = parse_line("a cat --f 5 --w 96 --h 64 --i image.png --camera_direction In", faster, GENERATOR)
    assert (told.camera_direction, told.camera_speed) == ("In", 0.1)
