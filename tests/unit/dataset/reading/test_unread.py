"""Nothing that lies in a dataset's folder is passed over without a word."""

from pathlib import Path

import pytest

from dataset.config import read_config
from dataset.reading.media import probe
from dataset.reading.unread import find_unread
from dataset.sources import list_items
from tests.unit.dataset.drawing import draw_image, draw_video, write_toml


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "media").mkdir()
    return tmp_path / "media"


def configure(lines, kind="video"):
    return read_config(write_toml(Path("data.toml"), f'[[datasets]]\n{kind}_directory = "media"\n{lines}'))


def unread(lines="", kind="video"):
    config, *_ = configure(lines, kind)
    items = list_items(config, allow_missing_captions=True)
    return {file.path.name: file.reason for file in find_unread(config, [item.path for item in items])}


def touch(folder, *names):
    for name in names:
        (folder / name).write_text("something")


def test_what_is_not_read_is_named_with_its_reason(folder, capsys):
    draw_video(folder / "a.mp4", 1)
    draw_image(folder / "still.png")
    touch(folder, "a.txt", "phone.heic", "b.xyz", "b.txt", "gone.txt", "photo.jxl")
    assert unread() == {
        "b.xyz": ".xyz is not supported",
        "gone.txt": "a caption without a media file",
        "phone.heic": ".heic is not supported",
        "photo.jxl": ".jxl is not supported",
        "still.png": "an image",
    }
    told = capsys.readouterr().err
    assert "5 files are ignored: b.xyz (.xyz is not supported), gone.txt (a caption without a media file)" in told


def test_a_video_in_a_folder_of_images_is_named_unless_another_dataset_reads_it(folder):
    draw_image(folder / "a.png")
    draw_video(folder / "b.mp4", 1)
    touch(folder, "a.txt", "b.txt")
    assert unread(kind="image") == {"b.mp4": "a video"}
    both = 'cache_directory = "one"\n[[datasets]]\nvideo_directory = "media"\ncache_directory = "two"'
    assert unread(both, kind="image") == {}


def test_what_belongs_there_is_not_named(folder):
    draw_video(folder / "a.mp4", 1)
    (folder / "walk").mkdir()
    draw_image(folder / "walk/0.png")
    touch(
        folder,
        "a.txt",
        "a.1.txt",
        "walk.txt",
        "a.json",
        "a_wan_te.safetensors",
        "manifest.db",
        "notes.md",
        ".hidden.txt",
    )
    assert unread('caption_variants = "files"') == {}
    assert unread() == {"a.1.txt": "a caption without a media file"}


@pytest.mark.parametrize(
    ("name", "codec"),
    [("A.MTS", "libx264"), ("a.m2ts", "libx264"), ("a.ts", "libx264"), ("a.3gp", "mpeg4"), ("a.ogv", "libvpx")],
)
def test_videos_of_every_suffix_that_can_be_read_are_read(folder, name, codec):
    draw_video(folder / name, 5, codec=codec, size=(176, 144))
    assert unread() == {}
    (item,) = list_items(configure("")[0], allow_missing_captions=True)
    assert (item.path.name, probe(item.path).num_frames) == (name, 5)


@pytest.mark.parametrize("name", ["a.TIFF", "a.tif", "a.jfif", "a.jpe", "a.tga", "a.ppm", "a.jp2"])
def test_images_of_every_suffix_that_can_be_read_are_read(folder, name):
    draw_image(folder / name)
    assert unread(kind="image") == {}
    (item,) = list_items(configure("", "image")[0], allow_missing_captions=True)
    assert (item.path.name, probe(item.path).width) == (name, 64)
