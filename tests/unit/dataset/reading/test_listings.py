import json
from pathlib import Path

import pytest

from dataset.config import read_config
from dataset.reading.listings import find_entries
from dataset.sources import list_items, plan_clips
from tests.unit.dataset.drawing import draw_image, make_clips, write_toml
from wan_train.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with data/clips/{a,b}.mp4 and data/stills/{a,b}.png."""
    monkeypatch.chdir(tmp_path)
    make_clips(tmp_path / "data/clips", {"a": 5, "b": 1})
    (tmp_path / "data/stills").mkdir()
    for name in "ab":
        draw_image(tmp_path / f"data/stills/{name}.png")
    return tmp_path


def configure(text, name="data.toml"):
    (config,) = read_config(write_toml(Path(name), text))
    return config


def listed(kind, text, *, more="", name=None):
    """The dataset of a listing with this text; `kind` is as in the key, such as video_jsonl."""
    listing = Path(name or f"data/list.{kind.split('_')[1]}")
    listing.write_text(text, encoding="utf-8")
    return configure(f'[[datasets]]\n{kind}_file = "{listing}"\ncache_directory = "cache"\n{more}')


def items_of(config, **options):
    return [
        (str(item.path), *item.captions) for item in list_items(config, **{"allow_missing_captions": False, **options})
    ]


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_a_jsonl_file_names_media_from_the_working_directory(folder):
    text = lines(
        {"video_path": "data/clips/b.mp4", "caption": " grüße "},
        {"video_path": str(folder / "data/clips/a.mp4"), "caption": "two\nlines"},
    )
    config = listed("video_jsonl", "\ufeff" + text.replace("\n", "\n\n"))
    assert items_of(config) == [
        ("data/clips/b.mp4", "grüße"),
        (str(folder / "data/clips/a.mp4"), "two\nlines"),
    ]
    assert (config.is_video, str(config)) == (True, "dataset 1 (data/list.jsonl)")
    plan = plan_clips(config, list_items(config, allow_missing_captions=False))
    assert [clip.item.path.name for clip in plan.clips] == ["b.mp4", "a.mp4"]


def test_a_jsonl_file_of_images(folder):
    text = lines({"image_path": "data/stills/a.png", "caption": "a"})
    assert items_of(listed("image_jsonl", text)) == [("data/stills/a.png", "a")]


@pytest.mark.parametrize(("kind", "media"), [("video", "clips/b.mp4"), ("image", "stills/b.png")])
def test_a_csv_file_names_media_from_its_own_folder(folder, kind, media):
    text = f'prompt,{kind}\r\n"a, ""quoted""\nprompt",{media}\r\n'
    assert items_of(listed(f"{kind}_csv", text)) == [(f"data/{media}", 'a, "quoted"\nprompt')]
    absolute = f"{kind},prompt\n{folder / 'data' / media},b\n"
    assert items_of(listed(f"{kind}_csv", absolute)) == [(str(folder / "data" / media), "b")]


def test_a_listing_may_have_any_name_but_says_what_it_is(folder):
    text = lines({"video_path": "data/clips/a.mp4", "caption": "a"})
    assert len(items_of(listed("video_jsonl", text, name="list.txt"))) == 1
    with pytest.raises(InputError, match=r"video_csv_file = .*list\.jsonl.*a \.csv file"):
        listed("video_csv", text, name="list.jsonl")


def test_missing_captions_of_a_listing_are_as_those_of_a_folder(folder):
    config = listed("video_jsonl", lines({"video_path": "data/clips/a.mp4"}))
    with pytest.raises(InputError, match=r"1 of 1 files have no caption \(a\.mp4\)"):
        items_of(config)
    assert items_of(config, allow_missing_captions=True) == [("data/clips/a.mp4", "")]


GOOD = lines({"video_path": "data/clips/a.mp4", "caption": "a"})


@pytest.mark.parametrize(
    ("kind", "text", "parts"),
    [
        ("video_jsonl", GOOD + "{nothing}\n", ["list.jsonl line 2", "JSON"]),
        ("video_jsonl", GOOD + "\n[1]\n", ["list.jsonl line 3", "video_path"]),
        ("video_jsonl", lines({"image_path": "data/stills/a.png", "caption": "a"}), ["line 1", "video_path"]),
        ("video_jsonl", lines({"video_path": 3, "caption": "a"}), ["line 1", "not a string"]),
        ("video_jsonl", lines({"video_path": "data/clips/a.mp4", "caption": 3}), ["line 1", "caption"]),
        ("video_jsonl", GOOD + lines({"video_path": "a.mp4", "caption": "a"}), ["line 2", "no such file: a.mp4"]),
        ("image_jsonl", lines({"image_path": "data/clips/a.mp4", "caption": "a"}), ["line 1", "not a supported image"]),
        ("video_jsonl", "", ["no videos in the file"]),
        ("video_csv", "video,caption\nclips/a.mp4,a\n", ["list.csv", "no column prompt", "video,prompt"]),
        ("video_csv", "video,prompt\nclips/a.mp4\n", ["list.csv line 2", "one cell"]),
        ("video_csv", "video,prompt\nclips/a.mp4,a,b\n", ["list.csv line 2", "one cell"]),
        ("video_csv", "video,prompt\n,a\n", ["list.csv line 2", "not a string"]),
        ("video_csv", "video,prompt\nclips/a.mp4,a\nclips/c.mp4,c\n", ["line 3", "no such file: data/clips/c.mp4"]),
        ("video_csv", 'video,prompt\n"clips/a.mp4"x,a\n', ["line 2", "not CSV"]),
        ("video_jsonl", GOOD + GOOD, ["share caches", "a.mp4 and a.mp4"]),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(folder, kind, text, parts):
    with pytest.raises(InputError) as raised:
        items_of(listed(kind, text))
    assert all(part in str(raised.value) for part in parts), str(raised.value)


def test_what_is_not_read_of_a_listing_is_told(folder, capsys):
    items_of(listed("video_jsonl", lines({"video_path": "data/clips/a.mp4", "caption": "a", "fps": 3})))
    assert "ignoring unknown columns: fps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('video_jsonl_file = "data/none.jsonl"\ncache_directory = "cache"', "no such file: data/none.jsonl"),
        ('video_jsonl_file = "data/list.jsonl"', "cache_directory"),
        ('video_jsonl_file = "data/list.jsonl"\ncache_directory = "cache"\nrecursive = true', "is only for folders"),
        ('video_jsonl_file = "data/list.jsonl"\nvideo_directory = "data/clips"', "set exactly one of"),
        ('image_csv_file = "data/list.csv"\ncache_directory = "cache"\ntarget_frames = [5]', "is only for videos"),
    ],
)
def test_a_dataset_with_a_listing_says_what_it_takes(folder, text, part):
    for name in ("list.jsonl", "list.csv"):
        (folder / "data" / name).write_text("")
    with pytest.raises(InputError) as raised:
        configure(f"[[datasets]]\n{text}")
    assert part in str(raised.value)


def test_sub_folders_are_read_when_asked_for(folder):
    make_clips(folder / "data/clips/below/.hidden", {"h": 1})
    make_clips(folder / "data/clips/below/deeper", {"c": 1})
    make_clips(folder / "data/clips/.hidden", {"d": 1})
    (folder / "data/clips/below/round").symlink_to(folder / "data/clips", target_is_directory=True)
    text = '[[datasets]]\nvideo_directory = "data/clips"\n'
    assert items_of(configure(text)) == [("data/clips/a.mp4", "caption of a"), ("data/clips/b.mp4", "caption of b")]
    assert items_of(configure(f"[general]\nrecursive = true\n{text}")) == [
        ("data/clips/a.mp4", "caption of a"),
        ("data/clips/b.mp4", "caption of b"),
        ("data/clips/below/deeper/c.mp4", "caption of c"),
    ]


def test_the_order_of_a_folder_is_not_the_file_systems(folder, monkeypatch):
    make_clips(folder / "data/clips/below", {"c": 1, "B": 1})
    config = configure('[[datasets]]\nvideo_directory = "data/clips"\nrecursive = true')
    found, listed = find_entries(config), Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: reversed(sorted(listed(path))))
    assert find_entries(config) == found
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(listed(path))))
    assert find_entries(config) == found


def test_files_of_one_name_in_one_cache_folder_are_an_error_with_both_paths(folder):
    make_clips(folder / "data/clips/below", {"a": 1})
    config = configure('[[datasets]]\nvideo_directory = "data/clips"\nrecursive = true')
    with pytest.raises(InputError, match=r"data/clips/a\.mp4 and data/clips/below/a\.mp4.*rename"):
        items_of(config)


def test_an_empty_folder_points_at_its_sub_folders(folder):
    make_clips(folder / "data/deep/clips", {"a": 1})
    with pytest.raises(InputError, match=r"no videos in the folder.*recursive = true"):
        find_entries(configure('[[datasets]]\nvideo_directory = "data/deep"'))


def test_datasets_may_read_one_folder_into_several_caches(folder):
    text = '[[datasets]]\nvideo_directory = "data/clips"\nresolution = 64\ncache_directory = "cache/{}"\n'
    small, large = read_config(write_toml(Path("data.toml"), text.format("a") + text.replace("64", "96").format("b")))
    assert [item[0] for item in items_of(small)] == [item[0] for item in items_of(large)]
    assert (small.resolution, large.resolution) == ((64, 64), (96, 96))


def test_a_json_file_says_what_a_toml_file_says(folder):
    tables = {
        "general": {"resolution": [64, 48], "caption_prefix": "sks, "},
        "datasets": [{"video_directory": "data/clips", "source_fps": 24, "target_frames": [1, 5]}],
    }
    config = configure(json.dumps(tables), "data.json")
    assert (config.resolution, config.source_fps, config.target_frames) == ((64, 48), 24.0, (1, 5))
    assert isinstance(config.source_fps, float)
    assert items_of(config)[0] == ("data/clips/a.mp4", "sks, caption of a")


@pytest.mark.parametrize(("text", "part"), [('{"datasets": [}', "not valid JSON: .*line 1"), ("[]", "an object")])
def test_a_bad_json_file_is_named(folder, text, part):
    with pytest.raises(InputError, match=rf"data\.json.*{part}"):
        configure(text, "data.json")


def test_a_prefix_goes_before_every_caption_and_stands_alone_without_one(folder):
    (folder / "data/clips/b.txt").unlink()
    config = configure('[[datasets]]\nvideo_directory = "data/clips"\ncaption_prefix = "sks man, "')
    assert items_of(config, allow_missing_captions=True) == [
        ("data/clips/a.mp4", "sks man, caption of a"),
        ("data/clips/b.mp4", "sks man,"),
    ]
