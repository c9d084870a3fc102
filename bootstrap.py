"""From a fresh clone to a working tree, with nothing but CPython.

    python bootstrap.py demo [FOLDER] [--fast]   teach a small model a new word, and see it (in demo/)
    python bootstrap.py test [ARGUMENT]...       the tests; the arguments go to pytest

Both first create `.venv` and install into it, unless already done: requirements-base.txt for the demo; for the tests
requirements.txt and requirements-dev.txt; versions are those of constraints.txt. pip's output goes to .venv/pip.log.
"""

# Old Python versions must be able to parse this file, to report that they are too old.
from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = "wan-train.json"  # in .venv: what is installed there
LOG = "pip.log"  # in .venv: output of the last installation
LINES_SHOWN = 20  # lines of the log printed on failure
BASE = "requirements-base.txt"
FULL = "requirements.txt"
DEVELOPMENT = "requirements-dev.txt"
CONSTRAINTS = "constraints.txt"
# Each process takes half of the tests in order, so that the tests of a file share fixtures; a process that is done
# takes over tests from the other.
SIDE_BY_SIDE = ["-n", "2", "--dist", "worksteal"]
OLDEST, NEWEST = (3, 11), (3, 13)
UNFINISHED = {"python": "unfinished"}


class Failure(Exception):
    """An error message of one line, and the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def main(arguments: list[str]) -> int:
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        check_python(sys.version_info[:2], platform.python_implementation())
        command, rest = read_arguments(arguments)
        if command == "test":
            run([prepare([FULL, DEVELOPMENT]) / "python", "-m", "pytest", *SIDE_BY_SIDE, *rest], shown="pytest")
        else:
            run([prepare([BASE]) / "python", "examples/nano/demo.py", *rest], shown="the demo")
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return failure.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def check_python(version: tuple[int, ...], implementation: str) -> None:
    if implementation != "CPython" or not OLDEST <= tuple(version) <= NEWEST:
        shown = ".".join(str(part) for part in version)
        oldest, newest = (f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))
        raise Failure(
            f"{implementation} {shown} is not supported: CPython {oldest} to {newest} is required;"
            f" install it and run, for example, 'python{newest} bootstrap.py demo'",
            2,
        )


def read_arguments(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the command and its arguments; the demo's folder is made absolute, because the demo starts in the repo
    root."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "test":
        return command, rest
    fast, folders = [word for word in rest if word == "--fast"], [word for word in rest if word != "--fast"]
    if command == "demo" and len(fast) <= 1 and len(folders) <= 1 and not any(word[:1] == "-" for word in folders):
        return command, [*(str(Path(folder).resolve()) for folder in folders), *fast]
    raise Failure("usage: python bootstrap.py demo [FOLDER] [--fast] | test [PYTEST ARGUMENT]...", 2)


def prepare(requirements: list[str]) -> Path:
    """Install the requirement files into `.venv` if needed; return the folder of its programs."""
    programs = VENV / ("Scripts" if os.name == "nt" else "bin")
    installed, wanted = read_stamp(), wanted_stamp(requirements)
    runs = any((programs / name).exists() for name in ("python", "python.exe"))
    if runs and all(installed.get(key) == value for key, value in wanted.items()):
        return programs
    if not runs or installed.get("python") != wanted["python"]:
        if VENV.exists() and not installed:
            raise Failure(
                f"{VENV} was not created by bootstrap.py: move it away, or install the requirements into it yourself"
            )
        make_environment()
        installed = {}
    write_stamp(UNFINISHED)
    print(
        f"installing {' and '.join(requirements)} (only once, takes a few minutes; log in {VENV.name}/{LOG})",
        flush=True,
    )
    files = ["-c", CONSTRAINTS, *(part for name in requirements for part in ("-r", name))]
    run_logged([programs / "python", "-m", "pip", "install", "--no-input", "--disable-pip-version-check", *files])
    write_stamp({**installed, **wanted})
    return programs


def make_environment() -> None:
    """Create an empty `.venv`, deleting what an interrupted installation left."""
    print(f"creating {VENV.name} with Python {platform.python_version()}", flush=True)
    VENV.mkdir(exist_ok=True)
    write_stamp(UNFINISHED)  # first, and kept: after an interrupted removal the folder must still be recognised as ours
    for child in VENV.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.name != STAMP:
            child.unlink()
    # The base interpreter of an active environment, which may be the environment that was just removed.
    python = getattr(sys, "_base_executable", "") or sys.executable
    hint = "on Debian and Ubuntu the package python3-venv must be installed"
    run_logged([python, "-m", "venv", VENV], shown=f"{python} -m venv ({hint})")


def wanted_stamp(requirements: list[str]) -> dict[str, str]:
    """Return the stamp of a `.venv` with these requirement files and those that they include."""
    # The folder is part of the stamp: programs of a moved environment do not start. So are the constraints, for each
    # file separately, because an installation of some files leaves the others unchanged.
    constraints = (ROOT / CONSTRAINTS).read_bytes()
    digests = {
        name: hashlib.sha256((ROOT / name).read_bytes() + constraints).hexdigest()
        for name in with_included(requirements)
    }
    return {"python": f"{platform.python_version()} in {VENV}", **digests}


def with_included(requirements: list[str]) -> list[str]:
    """Return the requirement files and those that their lines `-r NAME` include, without duplicates."""
    names: list[str] = []
    waiting = list(requirements)
    while waiting:
        name = waiting.pop(0)
        if name not in names:
            names.append(name)
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
            waiting += [line.split()[1] for line in lines if line.startswith("-r ")]
    return names


def read_stamp() -> dict[str, str]:
    """Return the stamp of `.venv`; empty if there is none."""
    try:
        stamp = json.loads((VENV / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(stamp: dict[str, str]) -> None:
    temporary = VENV / f"{STAMP}.new"
    temporary.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    temporary.replace(VENV / STAMP)


def run(command: list[str | Path], *, shown: str = "") -> None:
    """Run a command from the repo root. Raises Failure, with the command, if it fails."""
    words = [str(word) for word in command]
    check_code(subprocess.run(words, cwd=ROOT).returncode, shown or shlex.join(words))


def run_logged(command: list[str | Path], *, shown: str = "") -> None:
    """Run a command with its output in a log file, the end of which is printed if it fails."""
    words = [str(word) for word in command]
    path = VENV / LOG
    with open(path, "w", encoding="utf-8") as log:
        code = subprocess.run(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(["...", *lines[-LINES_SHOWN:]]), file=sys.stderr)
    check_code(code, shown or shlex.join(words))


def check_code(code: int, shown: str) -> None:
    """Raise Failure for the exit code of a failed command."""
    if code:
        raise Failure(f"exit code {code} from: {shown}", code if code > 0 else 128 - code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
