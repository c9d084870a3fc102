"""What the tree as a whole must not hold, and that what its pages point at is there."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = {".py", ".md", ".toml", ".txt", ".json", ".yaml", ".yml", ".sh", ".cfg", ".ini", ""}
FORBIDDEN = {
    "path of one machine": r"(?<![\w.])/(?:work|farm|root|tmp|home|opt|mnt|Users)/\w",
    "package index": r"index-url|find-links|https?://[^\s/]*(?:pypi|pythonhosted|wheel)",
    "address": r"(?<![\d.=])(?!127\.0\.0\.1|0\.0\.0\.0)(?:\d{1,3}\.){3}\d{1,3}(?![\d.])",
    "unfinished work": r"\b(?:TODO|FIXME|XXX)\b",
}
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def tree() -> list[Path]:
    """The files that git knows or would add; without git, all but the hidden ones."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]
    found = (path for path in ROOT.rglob("*") if path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]


PAGES = [path for path in tree() if path.suffix == ".md"]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        yield f"{named(path)}:{number}", line


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_tree_holds_no(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    texts = [path for path in tree() if path.suffix in TEXT and path != Path(__file__)]
    assert [where for path in texts for where, line in lines(path) if pattern.search(line)] == []


def test_no_file_is_too_big_for_a_repository() -> None:
    big = {named(path): path.stat().st_size for path in tree() if path.stat().st_size > 8_000_000}
    assert big == {}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = [link for link in links if "://" not in link and not leads_somewhere(page, link)]
    assert broken == []


def leads_somewhere(page: Path, link: str) -> bool:
    """Whether a relative link names a file, and its anchor a heading there."""
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if not anchor or not target.is_file():
        return target.exists()
    headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> list[tuple[str, str]]:
    """(where, command) of every entry point that a page tells the reader to run."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        for line in text.splitlines():
            if re.match(r"\s*(\$ )?(python|accelerate launch)\b.*\b\w+\.py\b", line):
                found.append((named(page), line.strip().removeprefix("$ ")))
    return found


def test_options_in_the_pages_exist() -> None:
    unknown = []
    for where, command in commands():
        words = shlex.split(command, comments=True)
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        if not (ROOT / words[script]).is_file():
            unknown.append(f"{where}: {words[script]}")
            continue
        given = {word.split("=")[0] for word in words[script + 1 :] if word.startswith("--")}
        if given:
            unknown += [f"{where}: {words[script]} {flag}" for flag in sorted(given - known_options(words[script]))]
    assert unknown == []


def known_options(script: str) -> set[str]:
    shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    return set(re.findall(r"--\w+", shown))


@pytest.mark.parametrize("path", TESTS, ids=named)
def test_tests_can_fail(path: Path) -> None:
    """Every test asserts something, itself, through a function of its file or by a check of ours that raises."""
    found = ast.parse(path.read_text(encoding="utf-8"))
    defined = {node.name: node for node in ast.walk(found) if isinstance(node, ast.FunctionDef)}
    checking = {name for name, node in defined.items() if checks(node)}
    while more := {name for name in defined.keys() - checking if called(defined[name]) & checking}:
        checking |= more
    assert [name for name in defined if name.startswith("test_") and name not in checking] == []


def checks(node: ast.AST) -> bool:
    asserting = ("raises", "warns", "fail")
    calls = called(node)
    return any(isinstance(part, ast.Assert) for part in ast.walk(node)) or any(
        name in asserting or name.startswith(("assert_", "check_")) for name in calls
    )


def called(node: ast.AST) -> set[str]:
    functions = (part.func for part in ast.walk(node) if isinstance(part, ast.Call))
    return {
        f.attr if isinstance(f, ast.Attribute) else f.id for f in functions if isinstance(f, ast.Attribute | ast.Name)
    }
