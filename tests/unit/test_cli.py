from dataclasses import dataclass

import pytest

from docs.make_options import describe
from wan_train.cli import Tool, choose, option, parse, run
from wan_train.errors import InputError, RunError


@dataclass(frozen=True)
class Paint:
    """Paint."""

    colour: str = option("red", "Its colour.", choices=("red", "green"), shortcuts={"--grass": "green"})
    coats: int = option(2, "How many.", minimum=1, maximum=5, flags=("--layers",))
    size: tuple[int, int] | None = option(None, "Wall.", minimum=1, metavar="W H")
    names: tuple[str, ...] = option((), "Names.")
    share: float | None = option(None, "Share.", minimum=0, maximum=1)
    wet: bool = option(False, "Wet.")
    tin: str = option("", "Tin.", required=True)


@dataclass(frozen=True)
class All:
    paint: Paint


def paint(*words: str) -> Paint:
    return parse(All, ["--tin", "t", *words]).paint


def test_defaults_and_types() -> None:
    assert paint() == Paint(tin="t")
    given = paint("--coats", "3", "--size", "4", "5", "--names", "a", "b", "--share", "0.5", "--wet")
    assert given == Paint(tin="t", coats=3, size=(4, 5), names=("a", "b"), share=0.5, wet=True)


@pytest.mark.parametrize("words", [["--size", "4*5"], ["--size=4*5"], ["--size", "4x5"], ["--size", "4", "5"]])
def test_two_numbers_are_also_written_as_one_word(words: list[str]) -> None:
    assert paint(*words, "--names", "4*5").size == (4, 5)
    assert paint(*words, "--names", "4*5").names == ("4*5",)


def test_every_spelling_sets_the_same_field() -> None:
    assert paint("--grass").colour == paint("--colour", "green").colour == "green"
    assert paint("--layers", "4").coats == 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--coat", "1"], "did you mean --coats"),
        (["--colour", "gren"], "did you mean green"),
        (["--coats", "0"], "1 to 5"),
        (["--coats", "two"], "whole number"),
        (["--share", "1.5"], "0 to 1"),
        (["--share", "nan"], "out of range"),
        (["--size", "4"], "2 arguments"),
    ],
)
def test_bad_words_say_what_would_be_good(words: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        paint(*words)


def test_a_required_option_is_named() -> None:
    with pytest.raises(InputError, match="--tin"):
        parse(All, [])


def test_choose_lists_the_known() -> None:
    assert choose("thing", "a", {"a": 1}) == 1
    with pytest.raises(InputError, match="unknown thing 'b': known are a"):
        choose("thing", "b", {"a": 1})


def fail_by_user(settings: All) -> None:
    raise InputError("the tin\nis empty")


def fail_in_run(settings: All) -> None:
    raise RunError("dried up")


def succeed(settings: All) -> None:
    print(settings.paint.tin)


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [("succeed", 0, ""), ("fail_by_user", 2, "error: the tin is empty\n"), ("fail_in_run", 1, "error: dried up\n")],
)
def test_run_turns_outcomes_into_exit_codes_and_one_line(
    name: str, code: int, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    module = types.ModuleType("painter")
    setattr(module, name, globals()[name])
    monkeypatch.setitem(sys.modules, "painter", module)
    assert run(Tool("painter.py", "Paints.", All, f"painter:{name}"), ["--tin", "t"]) == code
    assert capsys.readouterr().err == told


def test_the_options_page_holds_every_option_default_and_choice() -> None:
    page = describe(Tool("painter.py", "Paints.", All, ""))
    for text in ("--colour", "--grass", "--layers", "red, green", "1 to 5", "required", "`2`"):
        assert text in page
