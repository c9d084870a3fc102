from dataclasses import replace
from pathlib import Path

import pytest

from wan_train.errors import InputError
from wan_train.models.variants import VARIANTS
from wan_train.sampling.grammar import parse_line, read_prompts
from wan_train.sampling.request import checked, fitted, preview_defaults

DEFAULTS = preview_defaults(VARIANTS["t2v-1.3B"])


def test_a_bare_line_takes_the_tasks_shift_and_guidance() -> None:
    request = parse_line("a cat", DEFAULTS)
    assert (request.prompt, request.width, request.height, request.frames) == ("a cat", 256, 256, 1)
    assert (request.steps, request.noise_shift, request.guidance, request.seed) == (20, 5.0, 5.0, None)
    assert request.negative_prompt == VARIANTS["t2v-1.3B"].negative_prompt


def test_every_letter_sets_its_field() -> None:
    line = "a cat, w 3 wide --w 832 --h 480 --f 81 --d 7 --s 30 --g 6 --l 4.5 --fs 3 --n blurry, dark"
    request = parse_line(line, DEFAULTS)
    expected = replace(
        DEFAULTS,
        prompt="a cat, w 3 wide",
        width=832,
        height=480,
        frames=81,
        seed=7,
        steps=30,
        guidance=4.5,
        shift=3.0,
        negative_prompt="blurry, dark",
    )
    assert request == expected
    assert request.latent_shape == (16, 21, 60, 104)


@pytest.mark.parametrize("words", ["w 3 wide shots", "h 5", "d 7 dogs --w 832", "s 20 --s 4", "f 81 frames of fire"])
def test_words_that_begin_like_an_option_are_words(words: str) -> None:
    prompt, _, option = words.partition(" --")
    request = parse_line(words, DEFAULTS)
    assert request.prompt == prompt
    assert (request.width, request.height, request.frames, request.seed) == (
        832 if option == "w 832" else 256,
        256,
        1,
        None,
    )
    assert request.steps == (4 if option == "s 4" else 20)


def test_embedded_guidance_is_passed_over_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_line("a cat --g 6", DEFAULTS) == replace(DEFAULTS, prompt="a cat")
    assert "--g is ignored" in capsys.readouterr().err


def test_a_hyphen_in_the_words_is_not_an_option() -> None:
    assert parse_line("a well--known cat -- in hats", DEFAULTS).prompt == "a well--known cat -- in hats"


def test_sizes_and_lengths_are_made_to_fit() -> None:
    request = parse_line("a cat --w 850 --h 500 --f 80", DEFAULTS)
    assert (request.width, request.height, request.frames) == (848, 496, 77)
    assert fitted(replace(DEFAULTS, frames=2)).frames == 1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a cat --q 3", "known options: --w"),
        ("a cat --w wide", "--w wide"),
        ("a cat --s 0", "1 to 1000"),
        ("a cat --l", "nothing"),
        ("a cat --i cat.png", "image"),
        ("--w 832", "the prompt is empty"),
        ("a cat --w 832 --W 640", "--w is given twice"),
        ("a cat --l nan", "0 to 1000"),
        ("a cat --ei cat.png", r"--end_image_path \(--ei\): .*text alone"),
        ("a cat --i cat.png", r"--image_path \(--i\): .*text alone"),
        ("a cat --cn dir", r"--control_path \(--cn\): --task t2v-1.3B does not take a control video"),
        ("a cat --ci cat.png", r"--control_image_path \(--ci\) requires --one_frame_inference"),
        ("a cat --of x=1", "--of x=1 .* must be written as control_index=0"),
        ("a cat --of control_index=0,target_index=1 --ci cat.png", "--task t2v-1.3B does not support it"),
    ],
)
def test_bad_lines_are_refused(line: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        parse_line(line, DEFAULTS)


def test_a_file_gives_a_request_a_line_and_names_the_bad_one(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# mine\n\na cat --w 832\n  a dog\n", encoding="utf-8")
    assert [r.prompt for r in read_prompts(path, DEFAULTS)] == ["a cat", "a dog"]
    path.write_text("a cat\na dog --zz 1\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 2"):
        read_prompts(path, DEFAULTS)
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(InputError, match="no prompt"):
        read_prompts(path, DEFAULTS)
    with pytest.raises(InputError, match=r"absent\.txt"):
        read_prompts(tmp_path / "absent.txt", DEFAULTS)


def test_layers_that_no_step_skips_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    request = replace(preview_defaults(VARIANTS["t2v-1.3B"]), prompt="a", slg_layers=(1,))
    checked(replace(request, steps=20))
    assert capsys.readouterr().err == ""
    checked(replace(request, steps=3))
    assert "--slg_layers applies to none of 3 steps" in capsys.readouterr().err
