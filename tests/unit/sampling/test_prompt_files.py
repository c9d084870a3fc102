from dataclasses import replace
from pathlib import Path

import pytest

from wan_train.errors import InputError
from wan_train.models.variants import VARIANTS
from wan_train.sampling.grammar import read_prompts
from wan_train.sampling.request import preview_defaults

DEFAULTS = preview_defaults(VARIANTS["t2v-1.3B"])
CAT = replace(DEFAULTS, prompt="a cat", width=832, height=480, frames=81, steps=30, guidance=4.5, shift=3.0)
DOG = replace(CAT, prompt="a dog --w 64", seed=7, steps=4, negative_prompt="blurry")
TOML = """
[prompt]
width = 832
height = 480
frame_count = 81
sample_steps = 30
cfg_scale = 4.5
discrete_flow_shift = 3.0
guidance_scale = 6

[[prompt.subset]]
prompt = "a cat"

[[prompt.subset]]
prompt = "a dog --w 64"
seed = 7
sample_steps = 4
negative_prompt = "blurry"
"""
JSON = """[
  {"prompt": "a cat", "width": 832, "height": 480, "frame_count": 81, "sample_steps": 30,
   "cfg_scale": 4.5, "discrete_flow_shift": 3.0},
  {"prompt": "a dog --w 64", "w": 832, "h": 480, "f": 81, "d": 7, "s": 4, "l": 4.5, "fs": 3, "n": "blurry"},
  "a cat --w 832 --h 480 --f 81 --s 30 --l 4.5 --fs 3"
]
"""


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_toml_shares_what_stands_in_prompt(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, "p.toml", TOML), DEFAULTS) == [CAT, DOG]


def test_toml_without_subsets_is_one_prompt(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, "p.toml", '[prompt]\nprompt = "a cat"\n'), DEFAULTS) == [
        replace(DEFAULTS, prompt="a cat")
    ]


def test_json_takes_tables_letters_and_lines(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, "p.json", JSON), DEFAULTS) == [CAT, DOG, CAT]


def test_a_byte_order_mark_is_no_word(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfa cat\r\n")
    assert [request.prompt for request in read_prompts(path, DEFAULTS)] == ["a cat"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.toml", TOML + "width = 9\n", r"p\.toml, \[\[prompt.subset\]\] 2, line 14: width 9 .* 16 to 8192"),
        ("p.toml", '[prompt]\nprompt = "a"\nwidht = 64\n', r"line 1: unknown prompt option widht.*did you mean width"),
        ("p.toml", '[prompt]\n[[prompt.subset]]\nimage_path = "a.png"\nprompt = "a"\n', "image_path .* text alone"),
        ("p.toml", "[prompt]\n[[prompt.subset]]\nseed = 1\n", "the prompt is empty"),
        ("p.toml", "[prompt\n", "is not valid TOML"),
        ("p.toml", '[other]\nprompt = "a"\n', r"one table, \[prompt\]"),
        ("p.toml", '[prompt]\nsubset = "a"\n', "list of tables"),
        ("p.toml", "[prompt]\nsubset = []\n", "has no prompts"),
        ("p.toml", "[prompt]\nprompt = 3\n", "prompt = 3: must be a string"),
        ("p.json", '[{"prompt": "a"},\n\n {"prompt": "b", "s": 0}]', r"p\.json, prompt 2, line 3: s 0 .* 1 to 1000"),
        ("p.json", '[{"prompt": "a", "w": 64, "width": 64}]', "w and width set the same option"),
        ("p.json", '[{"prompt": "a", "width": 64.5}]', "width 64.5"),
        ("p.json", '[{"prompt": "a", "n": 5}]', "n = 5: must be a string"),
        ("p.json", '{"prompt": "a"}', "is not a list"),
        ("p.json", "[3]", "must be an object or a string, not 3"),
        ("p.json", '[\n"a",\n', "line 3: not valid JSON"),
        ("p.json", "[]", "has no prompts"),
        ("p.json", '["a", "b --zz 1"]', "prompt 2, line 1: unknown prompt option --zz"),
        ("p.txt", "a cat --width 832\n", r"unknown prompt option --width \(did you mean --w\?"),
        ("p.txt", "a cat --hieght 480\n", r"unknown prompt option --hieght \(did you mean --h\?"),
        ("p.txt", "a cat\n\nb --f x\n", r"p\.txt, line 3: --f x"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, name: str, text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_prompts(written(tmp_path, name, text), DEFAULTS)
