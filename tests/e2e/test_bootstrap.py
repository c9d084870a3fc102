"""bootstrap.py: what it asks of Python, what it makes of its arguments, and when it installs anything."""

import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

import pytest

import bootstrap
from examples.nano import demo


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """An empty clone with its requirement files; the commands that would have run are listed, and none is."""
    commands: list[list[str]] = []

    def pretend(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(words)
        if "venv" in words:
            (tmp_path / ".venv" / "bin").mkdir()
            (tmp_path / ".venv" / "bin" / "python").touch()
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(bootstrap.subprocess, "run", pretend)
    (tmp_path / "requirements-base.txt").write_text("# the base\ntorch>=2.9\n")
    (tmp_path / "requirements.txt").write_text("-r requirements-base.txt\nwandb>=0.19\n")
    (tmp_path / "requirements-dev.txt").write_text("pytest\n")
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    return commands


DEMO = ["requirements-base.txt"]
TESTS = ["requirements.txt", "requirements-dev.txt"]


def kinds(commands: list[list[str]]) -> list[str]:
    return [next(word for word in words if word in ("venv", "pip", "pytest")) for words in commands]


@pytest.mark.parametrize("version", [(3, 10), (3, 14), (2, 7)])
def test_another_python_is_told_which_one_is_needed(version: tuple[int, int]) -> None:
    with pytest.raises(bootstrap.Failure, match=r"CPython 3\.11 to 3\.13 is required") as failure:
        bootstrap.check_python(version, "CPython")
    assert failure.value.code == 2


def test_each_supported_python_is_accepted_and_other_implementations_are_not() -> None:
    for version in ((3, 11), (3, 12), (3, 13)):
        bootstrap.check_python(version, "CPython")
    with pytest.raises(bootstrap.Failure, match="PyPy"):
        bootstrap.check_python((3, 11), "PyPy")


@pytest.mark.parametrize(
    "arguments", [[], ["run"], ["demo", "--slow"], ["demo", "here", "there"], ["demo", "--fast", "--fast"]]
)
def test_what_it_does_not_know_ends_with_the_usage(root: Path, arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, root / "bootstrap.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: usage: python bootstrap.py demo")
    assert not done.stdout


def test_arguments_of_test_go_to_pytest(clone: list[list[str]]) -> None:
    assert bootstrap.main(["test", "-k", "vae", "-x"]) == 0
    assert clone[-1][1:] == ["-m", "pytest", *bootstrap.SIDE_BY_SIDE, "-k", "vae", "-x"]


def test_the_exit_code_is_that_of_the_tests(clone: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    bootstrap.prepare(TESTS)
    monkeypatch.setattr(bootstrap.subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 5))
    assert bootstrap.main(["test"]) == 5


@pytest.mark.parametrize("requirements", [DEMO, TESTS], ids=["demo", "test"])
def test_the_second_run_installs_nothing(requirements: list[str], clone: list[list[str]]) -> None:
    bootstrap.prepare(requirements)
    assert kinds(clone) == ["venv", "pip"]
    started = time.monotonic()
    bootstrap.prepare(requirements)
    assert kinds(clone) == ["venv", "pip"]
    assert time.monotonic() - started < 1


def test_the_demo_takes_the_base_and_the_tests_everything(clone: list[list[str]]) -> None:
    assert bootstrap.main(["demo"]) == 0
    assert bootstrap.main(["test"]) == 0
    pips = [words for words in clone if "pip" in words]
    assert pips[0][-4:] == ["-c", "constraints.txt", "-r", "requirements-base.txt"]
    assert pips[1][-6:] == ["-c", "constraints.txt", "-r", "requirements.txt", "-r", "requirements-dev.txt"]
    assert sum("venv" in words for words in clone) == 1, "what the tests add goes into the same environment"


def test_after_the_tests_the_demo_finds_what_it_needs(clone: list[list[str]]) -> None:
    bootstrap.prepare(TESTS)
    bootstrap.prepare(DEMO)
    assert kinds(clone) == ["venv", "pip"]


@pytest.mark.parametrize("name", ["requirements-base.txt", "requirements.txt", "requirements-dev.txt"])
def test_changed_requirements_are_installed(name: str, clone: list[list[str]], tmp_path: Path) -> None:
    bootstrap.prepare(TESTS)
    with open(tmp_path / name, "a") as file:
        file.write("einops\n")
    bootstrap.prepare(DEMO)
    assert kinds(clone).count("pip") == (2 if name in DEMO else 1)
    bootstrap.prepare(TESTS)
    assert clone[-1][-1] == ("requirements-dev.txt" if name not in DEMO else "requirements-base.txt")


def test_changed_constraints_are_installed_by_demo_and_tests(clone: list[list[str]], tmp_path: Path) -> None:
    bootstrap.prepare(TESTS)
    (tmp_path / "constraints.txt").write_text("torch==2.14.0\n")
    bootstrap.prepare(DEMO)
    assert kinds(clone) == ["venv", "pip", "pip"]
    bootstrap.prepare(TESTS)
    bootstrap.prepare(TESTS)
    assert kinds(clone) == ["venv", "pip", "pip", "pip"]


def test_each_stage_is_one_line(clone: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    bootstrap.prepare(DEMO)
    bootstrap.prepare(DEMO)
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        f"creating .venv with Python {platform.python_version()}",
        "installing requirements-base.txt (only once, takes a few minutes; log in .venv/pip.log)",
    ]
    assert not shown.err


def test_what_pip_says_goes_to_a_file_and_its_end_to_the_screen_where_it_fails(
    clone: list[list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend = bootstrap.subprocess.run

    def fail(words: list[str], *, stdout: TextIO | None = None, **rest: object) -> subprocess.CompletedProcess[str]:
        if "pip" not in words:
            return pretend(words, **rest)
        assert stdout is not None and rest["stderr"] == subprocess.STDOUT
        stdout.write("".join(f"line {number}\n" for number in range(100)))
        return subprocess.CompletedProcess(words, 1)

    monkeypatch.setattr(bootstrap.subprocess, "run", fail)
    assert bootstrap.main(["demo"]) == 1
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    *log, error = shown.err.splitlines()
    assert log == ["...", *(f"line {number}" for number in range(80, 100))]
    assert error.startswith("error: exit code 1 from: ") and error.endswith("-r requirements-base.txt")
    assert len((bootstrap.VENV / "pip.log").read_text().splitlines()) == 100


def test_another_python_or_a_moved_clone_starts_over(clone: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    bootstrap.prepare(DEMO)
    monkeypatch.setattr(bootstrap.platform, "python_version", lambda: "3.12.1")
    bootstrap.prepare(DEMO)
    assert kinds(clone) == ["venv", "pip"] * 2


def test_an_interrupted_install_starts_over(clone: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend = bootstrap.subprocess.run

    def interrupt(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if "pip" in words:
            raise KeyboardInterrupt
        return pretend(words)

    monkeypatch.setattr(bootstrap.subprocess, "run", interrupt)
    assert bootstrap.main(["test"]) == 130
    left = bootstrap.VENV / "lib"
    left.mkdir()
    monkeypatch.setattr(bootstrap.subprocess, "run", pretend)
    assert bootstrap.main(["test"]) == 0
    assert kinds(clone) == ["venv", "venv", "pip", "pytest"]
    assert not left.exists()


def test_an_environment_of_someone_else_is_left_alone(clone: list[list[str]], tmp_path: Path) -> None:
    mine = tmp_path / ".venv" / "mine.txt"
    mine.parent.mkdir()
    mine.touch()
    with pytest.raises(bootstrap.Failure, match="move it away"):
        bootstrap.prepare(DEMO)
    assert mine.exists()
    assert not clone


def test_a_failing_demo_ends_with_its_code(clone: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    bootstrap.prepare(DEMO)
    failed = lambda words, **_: subprocess.CompletedProcess(words, 3)  # noqa: E731
    monkeypatch.setattr(bootstrap.subprocess, "run", failed)
    assert bootstrap.main(["demo"]) == 3


@pytest.mark.parametrize("arguments", [[], ["--fast"], ["here"], ["here", "--fast"], ["--fast", "here"]])
def test_the_demo_gets_its_folder_and_how_fast(clone: list[list[str]], arguments: list[str]) -> None:
    assert bootstrap.main(["demo", *arguments]) == 0
    folder = [str(Path("here").resolve())] if "here" in arguments else []
    assert clone[-1][1:] == ["examples/nano/demo.py", *folder, *(["--fast"] if "--fast" in arguments else [])]


def test_every_option_of_the_demo_is_one_that_its_tool_takes(root: Path) -> None:
    for title, words in demo.commands("demo", "examples/nano", demo.FULL):
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        shown = subprocess.run([sys.executable, words[script], "--help"], cwd=root, capture_output=True, text=True)
        known = set(shown.stdout.replace(",", " ").split())
        assert {word for word in words[script + 1 :] if word.startswith("--")} <= known, title
