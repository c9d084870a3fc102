"""Optional packages: check whether they are installed, and the error message if not."""

import importlib
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wan_train.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
LISTS = ("requirements-base.txt", "requirements.txt")


def is_installed(module: str) -> bool:
    """Return whether the package of a module is installed, without importing it."""
    return find_spec(module.partition(".")[0]) is not None


def require(module: str, needed_by: str, *, package: str = "", instead: str = "") -> None:
    """Raise InputError if `module` is not installed. See `load` for the other parameters."""
    if not is_installed(module):
        raise InputError(missing(needed_by, package or module, instead=instead))


def load(
    module: str, attribute: str, needed_by: str, *, package: str = "", install: str = "", instead: str = ""
) -> Any:
    """Return `attribute` of `module`, from the pip package `package`. Raises InputError if it is missing or fails to
    load.

    `needed_by` is the option, as the user wrote it; `install` replaces the pip command in the message; `instead` is an
    alternative, such as "use --sdpa".
    """
    package = package or module.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as problem:
        lacking = (problem.name or module).partition(".")[0]
        if lacking != module.partition(".")[0]:
            needed = f"{lacking}, which {package} needs"
            raise InputError(missing(needed_by, needed, install="install it", instead=instead)) from None
        if not is_installed(module):
            raise InputError(missing(needed_by, package, install=install, instead=instead)) from None
        raise InputError(_broken(needed_by, package, problem, instead)) from None
    except Exception as problem:  # a build for a different torch or CUDA may raise anything
        raise InputError(_broken(needed_by, package, problem, instead)) from None


def missing(needed_by: str, package: str, *, install: str = "", instead: str = "") -> str:
    """Return the message for a missing package: what needs it, how to install it, and where it is listed."""
    if not install:
        listed = listed_in(package)
        install = f"pip install {package}" + (f" (listed in {listed})" if listed else "")
    return f"{needed_by} needs the package {package}: {install}" + (f", or {instead}" if instead else "")


def listed_in(package: str) -> str | None:
    """Return the requirements file that lists a package; None if there is none."""
    for name in LISTS:
        path = ROOT / name
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if any(re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() == package.lower() for line in lines):
            return name
    return None


def first_line(problem: Exception) -> str:
    """Return the first line of an error, shortened for use in a sentence."""
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return lines[0].strip().rstrip(":.")[:160]


def _broken(needed_by: str, package: str, problem: Exception, instead: str) -> str:
    return (
        f"{needed_by}: the package {package} cannot be loaded ({first_line(problem)}): {instead or 'install it again'}"
    )
