from pathlib import Path

import pytest

from dataset.config import read_config
from dataset.sources import list_items
from tests.unit.dataset.drawing import draw_image, draw_video, write_toml
from wan_train.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("clips", "masks", "controls"):
        (tmp_path / name).mkdir()
    return tmp_path


def items_of(lines, kind="video_directory", media="clips"):
    (config,) = read_config(write_toml(Path("data.toml"), f'[[datasets]]\n{kind} = "{media}"\n{lines}'))
    return list_items(config, allow_missing_captions=True)


def test_masks_match_by_stem_and_a_video_goes_before_a_image(folder, capsys):
    for name in ("a", "b", "c", "d"):
        draw_video(folder / f"clips/{name}.mp4", 1)
    draw_image(folder / "masks/a.png")
    draw_video(folder / "masks/a.mov", 1)
    draw_image(folder / "masks/b.jpg")
    (folder / "masks/c").mkdir()
    draw_image(folder / "masks/c/0.png")
    masks = [item.mask for item in items_of('mask_directory = "masks"')]
    assert masks == [Path("masks/a.mov"), Path("masks/b.jpg"), Path("masks/c"), None]
    assert "1 of 4 files have no mask (d.mp4): the loss covers the whole image" in capsys.readouterr().err


def test_controls_of_videos_match_whole_name_folder_stem_in_that_order(folder):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        draw_video(folder / "clips" / name, 1)
    for name in ("a.mp4", "a.avi", "b.mkv", "c.mkv"):
        draw_video(folder / "controls" / name, 1, codec="mpeg4")
    for name in ("a", "b"):
        (folder / "controls" / name).mkdir()
        draw_image(folder / "controls" / name / "0.png")
    draw_image(folder / "controls/c.png")
    controls = [item.control for item in items_of('control_directory = "controls"')]
    assert controls == [Path("controls/a.mp4"), Path("controls/b"), Path("controls/c.mkv")]


def test_controls_of_images_match_the_stem_and_then_numbers(folder):
    for name in ("a", "b"):
        draw_image(folder / f"clips/{name}.png")
    for name in ("a.jpg", "a_0.png", "b_10.png", "b_2.png", "b_x.png"):
        draw_image(folder / "controls" / name)
    controls = [item.control for item in items_of('control_directory = "controls"', "image_directory")]
    assert controls == [Path("controls/a.jpg"), Path("controls/b_2.png")]


def test_a_numbered_partner_belongs_to_the_item_of_its_name_if_there_is_one(folder, capsys):
    for name in ("shot", "shot_1", "shot_2", "walk"):
        draw_image(folder / f"clips/{name}.png")
    for name in ("shot_1", "shot_2", "walk_1"):
        draw_image(folder / f"controls/{name}.png")
    lines = f'control_directory = "{folder / "controls"}"'
    with pytest.raises(InputError, match=r"1 of 4 files have no control in .*controls \(shot\.png\): add them, or"):
        items_of(lines, "image_directory")
    draw_image(folder / "controls/shot_0.png")
    found = [item.control.name for item in items_of(lines, "image_directory")]
    assert found == ["shot_0.png", "shot_1.png", "shot_2.png", "walk_1.png"]
    (folder / "controls/shot_0.png").unlink()
    masks = [item.mask and item.mask.name for item in items_of(lines.replace("control", "mask", 1), "image_directory")]
    assert masks == [None, "shot_1.png", "shot_2.png", "walk_1.png"]
    assert "1 of 4 files have no mask (shot.png)" in capsys.readouterr().err


def test_the_alpha_is_the_mask_where_asked_for_and_no_other_is_there(folder):
    for name in ("a", "b"):
        draw_image(folder / f"clips/{name}.png", mode="RGBA")
    draw_image(folder / "masks/a.png")
    keys = 'mask_directory = "masks"\nalpha_mask = true'
    assert [item.mask for item in items_of(keys, "image_directory")] == [Path("masks/a.png"), Path("clips/b.png")]
    assert next(item.mask for item in items_of("alpha_mask = true", "image_directory")) == Path("clips/a.png")


def test_a_missing_control_is_an_error(folder):
    for name in ("a", "b"):
        draw_video(folder / f"clips/{name}.mp4", 1)
    draw_video(folder / "controls/a.mp4", 1)
    with pytest.raises(InputError, match=r"1 of 2 files have no control in controls \(b\.mp4\)"):
        items_of('control_directory = "controls"')


@pytest.mark.parametrize("key", ["mask_directory", "control_directory"])
def test_a_folder_that_is_not_there_is_named(folder, key):
    draw_video(folder / "clips/a.mp4", 1)
    with pytest.raises(InputError, match=f"{key}: no such folder: nowhere"):
        items_of(f'{key} = "nowhere"')


def test_a_listing_names_controls(folder):
    for name in ("a", "b"):
        draw_video(folder / f"clips/{name}.mp4", 1)
    draw_video(folder / "controls/x.mp4", 1)
    line = '{"video_path": "clips/%s.mp4", "caption": "c"%s}\n'
    with_control = line % ("a", ', "control_path": "controls/x.mp4"')
    keys = 'cache_directory = "cache"'
    (folder / "list.jsonl").write_text(with_control)
    (item,) = items_of(keys, "video_jsonl_file", "list.jsonl")
    assert item.control == Path("controls/x.mp4")
    (folder / "list.jsonl").write_text(with_control + line % ("b", ""))
    with pytest.raises(InputError, match=r"1 of 2 files have no control as control_path in list\.jsonl \(b\.mp4\)"):
        items_of(keys, "video_jsonl_file", "list.jsonl")
    (folder / "list.jsonl").write_text(with_control.replace("x.mp4", "y.mp4"))
    with pytest.raises(InputError, match=r"line 1: control_path 'controls/y\.mp4': no such file"):
        items_of(keys, "video_jsonl_file", "list.jsonl")
