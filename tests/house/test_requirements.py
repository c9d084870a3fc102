"""The requirements lists hold what the code imports, and CI's versions are within their ranges."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
OURS = {"wan_train", "networks", "dataset", "cache_tools", "generate", "examples"}
WITH_TRANSFORMERS = {"tokenizers", "huggingface_hub"}  # it installs them, and says in which versions
LISTS = ("requirements-base.txt", "requirements.txt", "requirements-dev.txt")


def read(name: str) -> dict[str, Requirement]:
    """The requirements of one file, without those that it includes."""
    lines = [line.partition(" #")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r "))]
    assert len({canonicalize_name(each.name) for each in found}) == len(found), f"{name} names a package twice"
    return {canonicalize_name(each.name): each for each in found}


def imported_at_once(path: Path) -> set[str]:
    """The packages that a file imports when it is imported itself: not within functions, not for types alone."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            waiting += [] if typing else list(ast.iter_child_nodes(node))
    return names


def test_the_full_list_begins_with_the_base() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert next(line for line in lines if not line.startswith("#")) == "-r requirements-base.txt"


def test_the_full_list_names_what_the_base_brings() -> None:
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8").partition("The base brings")[2].partition(";")[0]
    named = text.replace("#", " ").replace(" and ", ", ").replace("\n", " ").split(",")
    assert {canonicalize_name(name.strip()) for name in named} == read("requirements-base.txt").keys()


def test_each_package_is_listed_once() -> None:
    names = [name for each in LISTS for name in read(each)]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("name", LISTS)
def test_ranges_have_a_lower_bound_and_hold_what_ci_runs(name: str) -> None:
    pins = read("constraints.txt")
    for package, requirement in read(name).items():
        assert any(part.operator == ">=" for part in requirement.specifier), f"{package} has no lower bound"
        (pin,) = pins[package].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), f"{package} {pin}"


def test_constraints_pin_nothing_else() -> None:
    assert read("constraints.txt").keys() == {name for each in LISTS for name in read(each)}


def test_what_the_code_imports_at_once_is_in_the_base() -> None:
    """So that a run with default options works without the packages of single options."""
    base, distributions = read("requirements-base.txt"), packages_distributions()
    files = [path for folder in OURS for path in (ROOT / folder).rglob("*.py")]
    imported = {name: path for path in files for name in imported_at_once(path)}
    strange = {
        name: path.relative_to(ROOT).as_posix()
        for name, path in imported.items()
        if name not in sys.stdlib_module_names | OURS | WITH_TRANSFORMERS
        and not base.keys() & {canonicalize_name(each) for each in distributions.get(name, [name])}
    }
    assert strange == {}
    assert {"torch", "cv2", "transformers"} <= imported.keys(), "the imports were not found"
