"""What of a prompt line is an option, what only looks like one, and where quotes go."""

from dataclasses import replace
from pathlib import Path

import pytest

from generate.jobs import make_jobs
from generate.settings import GenerateSettings
from wan_train.cli import parse
from wan_train.errors import InputError
from wan_train.models.variants import VARIANTS
from wan_train.sampling.grammar import GENERATOR, PREVIEW, Grammar, parse_line, read_prompts
from wan_train.sampling.request import preview_defaults

DEFAULTS = preview_defaults(VARIANTS["t2v-1.3B"])
GRAMMARS = [PREVIEW, GENERATOR]


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_a_value_may_follow_an_equals_sign(grammar: Grammar, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = replace(DEFAULTS, prompt="a cat", width=832, height=480, negative_prompt="dark, a=b")
    assert parse_line("a cat --w=832 --h= 480 --n=dark, a=b", DEFAULTS, grammar) == wanted
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match=r"--wdth \(did you mean --w\?"):
        parse_line("a cat --wdth=832", DEFAULTS)


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize(
    ("line", "stray"),
    [
        ("a cat -w 832", "-w 832"),
        ("a cat \u2013w 832", "\u2013w 832"),
        ("a cat \u2014w 832 --h 480", "\u2014w 832"),
        ("a cat\u2014w 832", "\u2014w 832"),
        ("a cat \u2212-W=832", "\u2212-W=832"),
        ("a cat,--w 832", "--w 832"),
        ("a cat--w 832", "--w 832"),
        ("a cat ---w 832", "---w 832"),
        ("a cat --w:832", "--w:832"),
        ("a cat \u2014frame_count 81", "\u2014frame_count 81"),
        ("a cat --n dark, -s 20", "-s 20"),
    ],
)
def test_what_looks_like_an_option_and_is_none_is_told_with_its_line(
    grammar: Grammar, line: str, stray: str, capsys: pytest.CaptureFixture[str]
) -> None:
    request = parse_line(line, DEFAULTS, grammar)
    assert stray in request.prompt + request.negative_prompt and request.width == 256
    told = capsys.readouterr().err
    assert f'"{stray}" looks like an option' in told and line in told and told.count("WARNING") == 1
    with pytest.raises(InputError, match=f'"{stray}" looks like an option .* or leave out --strict_prompts'):
        parse_line(line, DEFAULTS, replace(grammar, strict=True))


@pytest.mark.parametrize(
    "line",
    [
        "a well--known cat -- in hats, semi-d, sci-fi, A\u2013D \u2014 i think",
        "the cat\u2014i think\u2014sleeps for 5-s, -5 degrees",
        "a cat --w 832 --n -1, --fs 5",
    ],
)
def test_words_with_hyphens_are_words(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    parse_line(line, DEFAULTS, replace(PREVIEW, strict=True))
    assert capsys.readouterr().err == ""


def test_a_file_says_which_line_and_a_table_takes_no_options_in_its_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, table = tmp_path / "p.txt", tmp_path / "p.toml"
    lines.write_text("a dog\na cat -w 832\n")
    table.write_text('[prompt]\nprompt = "a cat --w 832"\nnegative_prompt = "-h 480"\n')
    read_prompts(lines, DEFAULTS)
    assert 'p.txt, line 2: "-w 832"' in capsys.readouterr().err
    assert read_prompts(table, DEFAULTS)[0].prompt == "a cat --w 832"
    told = capsys.readouterr().err
    assert 'p.toml, [prompt], line 1: "--w 832" looks' in told and '"-h 480"' in told
    with pytest.raises(InputError, match=r"p\.txt, line 2: .*looks like an option"):
        read_prompts(lines, DEFAULTS, replace(PREVIEW, strict=True))


def test_the_generators_own_prompt_takes_no_options_either(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--task", "t2v-1.3B", "--dit", "dit.safetensors", "--prompt", "a cat --w 832"]
    make_jobs(parse(GenerateSettings, base))
    assert '--prompt: "--w 832" looks like an option' in capsys.readouterr().err
    with pytest.raises(InputError, match="--strict_prompts"):
        make_jobs(parse(GenerateSettings, [*base, "--strict_prompts"]))


@pytest.mark.parametrize(
    ("line", "prompt", "negative"),
    [
        ('"a cat" --n "dark, ugly" --w 64', "a cat", "dark, ugly"),
        ("'a cat' --n='dark'", "a cat", "dark"),
        ("\u201ca cat\u201d --n \u00abdark\u00bb", "a cat", "dark"),
        ('"a cat --n dark"', "a cat", "dark"),
        ('a cat --n ""', "a cat", ""),
        ('"stop" and "go" --n it says "no"', '"stop" and "go"', 'it says "no"'),
        ('the dogs\' "x" --n 5"', 'the dogs\' "x"', '5"'),
    ],
)
def test_quotes_go_where_they_enclose_all_of_a_text(line: str, prompt: str, negative: str) -> None:
    request = parse_line(line, DEFAULTS)
    assert (request.prompt, request.negative_prompt) == (prompt, negative)


def test_a_path_may_stand_in_quotes() -> None:
    line = parse_line('"a cat" --video_path "my clips/a b.mp4"', DEFAULTS, GENERATOR)
    assert line.video_path == "my clips/a b.mp4"
    with pytest.raises(InputError, match="the prompt is empty"):
        parse_line('"" --w 832', DEFAULTS)
