from pathlib import Path

import pytest

from dataset.config import read_config
from dataset.sources import list_items
from tests.unit.dataset.drawing import draw_image, write_toml
from wan_train.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with stills/{a,b}.png, without captions."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stills").mkdir()
    for name in "ab":
        draw_image(tmp_path / f"stills/{name}.png")
    return tmp_path / "stills"


def write(folder, **captions):
    for name, text in captions.items():
        (folder / f"{name.replace('_', '.')}.txt").write_text(text, encoding="utf-8")


def captions_of(lines, *, source='image_directory = "stills"', **options):
    text = f'[[datasets]]\n{source}\ncache_directory = "cache"\n{lines}'
    (config,) = read_config(write_toml(Path("data.toml"), text))
    items = list_items(config, **{"allow_missing_captions": False, **options})
    return {item.path.stem: item.captions for item in items}


def test_a_file_is_one_caption_unless_told_otherwise(folder):
    write(folder, a="one\n\ntwo\n", b="b", b_1="no variant")
    assert captions_of("") == {"a": ("one\n\ntwo",), "b": ("b",)}


def test_each_line_that_holds_something_is_a_variant(folder):
    write(folder, a=" one \r\n\n\t\ntwo\n", b="\n \n")
    assert captions_of('caption_variants = "lines"') == {"a": ("one", "two"), "b": ("",)}


def test_numbered_files_are_variants_in_the_order_of_their_numbers(folder):
    write(folder, a="zero", a_10="ten", a_9="nine", a_x="not a finite number", b_2="two alone")
    found = captions_of('caption_variants = "files"')
    assert found == {"a": ("zero", "nine", "ten"), "b": ("two alone",)}


def test_the_caption_of_another_file_is_no_variant(folder):
    draw_image(folder / "a.1.png")
    write(folder, a="a", a_1="of a.1.png", a_2="second", b="b", a_1_1="second of a.1.png")
    found = captions_of('caption_variants = "files"')
    assert found == {"a": ("a", "second"), "a.1": ("of a.1.png", "second of a.1.png"), "b": ("b",)}


def test_the_prefix_goes_before_every_variant(folder):
    write(folder, a="one\ntwo", b="b")
    found = captions_of('caption_variants = "lines"\ncaption_prefix = "sks "')
    assert found == {"a": ("sks one", "sks two"), "b": ("sks b",)}


def test_a_list_in_a_jsonl_file_gives_variants(folder):
    Path("list.jsonl").write_text(
        '{"image_path": "stills/a.png", "caption": ["one", "two"]}\n{"image_path": "stills/b.png", "caption": "b"}\n'
    )
    listing = 'image_jsonl_file = "list.jsonl"'
    assert captions_of("", source=listing) == {"a": ("one", "two"), "b": ("b",)}
    Path("list.jsonl").write_text('{"image_path": "stills/a.png", "caption": ["one", 2]}\n')
    with pytest.raises(InputError, match=r"line 1.*list of strings"):
        captions_of("", source=listing)


def test_a_cell_of_a_csv_file_may_hold_variants_in_lines(folder):
    Path("list.csv").write_text('image,prompt\nstills/a.png,"one\ntwo"\n')
    found = captions_of('caption_variants = "lines"', source='image_csv_file = "list.csv"')
    assert found == {"a": ("one", "two")}


def test_a_file_without_any_variant_has_no_caption(folder):
    write(folder, a="a")
    with pytest.raises(InputError, match=r"1 of 2 files have no \.txt caption \(b\.png\)"):
        captions_of('caption_variants = "files"')
    found = captions_of('caption_variants = "files"', allow_missing_captions=True)
    assert found == {"a": ("a",), "b": ("",)}
