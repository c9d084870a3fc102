import re

import numpy as np
import pytest
from PIL import Image

from cache_tools.settings import CONSOLE_COLOURS, LATENTS_TOOL
from cache_tools.show import draw_blocks, make_sheet
from dataset.reading.media import read_frames
from tests.unit.dataset.drawing import make_clips, read_number, write_toml
from wan_train.cli import run

CELL = re.compile(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_clips(tmp_path / "clips", {"a": 12, "b": 9})
    toml = '[[datasets]]\nvideo_directory = "clips"\ncache_directory = "cache"\nresolution = [64, 48]\n'
    write_toml(tmp_path / "data.toml", f'{toml}target_frames = [5]\nframe_extraction = "chunk"')
    return tmp_path


def show(*more: str) -> int:
    return run(LATENTS_TOOL, ["--dataset_config", "data.toml", "--debug_mode", *more])


def test_videos_show_the_frames_of_each_clip(folder, capsys):
    assert show("video") == 0
    files = sorted((folder / "cache_debug/dataset_1").iterdir())
    assert [path.stem[:11] for path in files] == ["a_00000-005", "a_00005-005", "b_00000-005"]
    numbers = [read_number(image) for _, image in read_frames(files[1], range(5))]
    assert numbers == [5, 6, 7, 8, 9]
    out = capsys.readouterr().out
    assert "clips/a.mp4 from frame 5: 64 wide, 48 high, 5 frames" in out and "caption of a" in out
    assert str(files[2].relative_to(folder)) in out
    assert not list(folder.glob("cache/*.safetensors"))


def test_images_are_sheets_of_all_frames(folder):
    assert show("image", "--debug_dir", "seen", "--console_num_images", "2") == 0
    files = sorted((folder / "seen/dataset_1").iterdir())
    assert len(files) == 2 and {path.suffix for path in files} == {".png"}
    sheet = np.asarray(Image.open(files[1]))
    assert sheet.shape == (2 * 48, 3 * 64, 3)
    numbers = [read_number(sheet[row : row + 48, x : x + 64]) for row in (0, 48) for x in (0, 64, 128)]
    assert numbers == [5, 6, 7, 8, 9, 0]  # the last place is empty


def test_a_control_is_shown_beside_its_clip(folder):
    make_clips(folder / "controls", {"a": 12, "b": 9})
    (folder / "data.toml").write_text((folder / "data.toml").read_text() + '\ncontrol_directory = "controls"')
    assert show("image", "--console_num_images", "1") == 0
    (file,) = (folder / "cache_debug/dataset_1").iterdir()
    sheet = np.asarray(Image.open(file))
    assert sheet.shape == (2 * 48, 3 * 128, 3)
    assert read_number(sheet[:48, 128:192]) == read_number(sheet[:48, 192:256]) == 1


def test_a_wide_sheet_is_made_smaller():
    assert make_sheet(np.zeros((81, 480, 832, 3), np.uint8)).shape == (9 * 130, 9 * 227, 3)
    assert make_sheet(np.zeros((1, 544, 3000, 3), np.uint8)).shape == (544, 3000, 3)


def test_the_terminal_shows_colours(folder, capsys):
    assert show("console", "--console_width", "16", "--console_num_images", "1") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "▀" in line]
    assert len(lines) == 6 and all(len(CELL.findall(line)) == 16 for line in lines)  # 16 x 12 pixels
    image = np.zeros((4, 8, 3), np.uint8)
    image[:2, :4], image[2:, 4:] = (255, 0, 0), (0, 0, 255)
    (line,) = draw_blocks(image, 4)
    assert CELL.findall(line)[0][:3] == ("255", "0", "0")
    assert CELL.findall(line)[3] == ("0", "0", "0", "0", "0", "255")


def test_the_rim_has_the_colour_asked_for():
    lines = list(draw_blocks(np.zeros((48, 64, 3), np.uint8), 20, "white"))
    rim = f"\x1b[{40 + CONSOLE_COLOURS.index('white')}m"
    assert all(line.startswith(rim) for line in lines)
    assert len(CELL.findall(lines[1])) == 16 and not CELL.findall(lines[0]) and not CELL.findall(lines[-1])


def test_an_unknown_way_is_refused(capsys):
    assert show("sheet") == 2
    assert "image, console, video" in capsys.readouterr().err
