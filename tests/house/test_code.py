"""The rules of the house that a machine can check: sizes, parameters, imports, and who may touch what."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("wan_train", "networks", "dataset", "cache_tools", "generate")
FOLDERS = (*PACKAGES, "examples", "benchmarks", "docs")
FILES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
PACKAGED = [path for path in FILES if path.relative_to(ROOT).parts[0] in PACKAGES]

# The model's inputs are promised to users as they are; an option has as many sides as argparse gives it.
WIDE = {"wan_train/models/dit/dit.py forward", "wan_train/cli.py option"}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{named(path)} {node.name}", node


def imported(path: Path) -> set[str]:
    """The full names of the modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module}
    return names


def test_files_fit_a_room() -> None:
    long = {named(path): lines for path in FILES if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 300}
    assert long == {}


def test_functions_fit_a_screen() -> None:
    lines = {
        name: (node.end_lineno or node.lineno) - node.lineno + 1 for path in FILES for name, node in functions(path)
    }
    assert {name: count for name, count in lines.items() if count > 60} == {}


def test_functions_take_few_parameters() -> None:
    wide = {}
    for name, node in (found for path in FILES for found in functions(path)):
        taken = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        if len([word for word in taken if word not in ("self", "cls")]) > 8 and name not in WIDE:
            wide[name] = len(taken)
    assert wide == {}


def test_booleans_are_given_by_name() -> None:
    """Functions and methods; what stands inside a function has the signature of its caller."""
    unnamed = [
        f"{named(path)} {node.name}({argument.arg})"
        for path in FILES
        for part in parse(path).body
        for node in (part.body if isinstance(part, ast.ClassDef) else [part])
        if isinstance(node, ast.FunctionDef)
        for argument in (*node.args.posonlyargs, *node.args.args)
        if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "bool"
    ]
    assert unnamed == []


def test_modules_are_named_for_what_they_do() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "misc", "base", "core"}
    assert [named(path) for path in FILES if path.stem in vague] == []


def test_the_command_line_is_seen_by_one_module() -> None:
    assert [named(path) for path in PACKAGED if "argparse" in imported(path)] == ["wan_train/cli.py"]


def test_pickles_are_read_by_one_module() -> None:
    reading = re.compile(r"\btorch\.load\(|\bpickle\.loads?\(|allow_pickle=True")
    found = {named(path) for path in PACKAGED if reading.search(path.read_text(encoding="utf-8"))}
    assert found <= {"wan_train/storage.py"}
    storage = (ROOT / "wan_train" / "storage.py").read_text(encoding="utf-8")
    loads = re.findall(r"torch\.load\(.*\)", storage)
    assert loads
    assert all("weights_only=True" in call for call in loads)


def test_packages_import_no_script() -> None:
    outside = {path.stem for path in ROOT.glob("*.py")} | {"examples", "benchmarks", "docs", "tests"}
    guilty = {named(path): sorted(outside & {name.split(".")[0] for name in imported(path)}) for path in PACKAGED}
    assert {name: found for name, found in guilty.items() if found} == {}


@pytest.mark.parametrize("script", [path.name for path in ROOT.glob("*.py") if path.stem != "bootstrap"])
def test_entry_points_are_a_dozen_lines(script: str) -> None:
    assert len((ROOT / script).read_text(encoding="utf-8").splitlines()) <= 15


def test_imports_point_down() -> None:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", code, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


def test_benchmarks_import_what_is_there() -> None:
    """They run rarely: what moves away from under them is found here."""
    lost = []
    for path in (ROOT / "benchmarks").rglob("*.py"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
                module = importlib.import_module(str(node.module))
                there = vars(module) | {
                    part.name: part for part in pkgutil.iter_modules(getattr(module, "__path__", []))
                }
                lost += [f"{named(path)} {alias.name}" for alias in node.names if alias.name not in there]
    assert lost == []


POSIX_MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix"}
POSIX_NAMES = {
    "os": "fork forkpty wait wait3 wait4 waitpid killpg getpgid setsid getuid geteuid getgid chown statvfs mkfifo "
    "uname sched_getaffinity getloadavg posix_fadvise pread pwrite sendfile O_DIRECTORY",
    "signal": "SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGALRM SIGQUIT SIGCHLD alarm pause pthread_sigmask sigwait setitimer",
    "mmap": "MAP_PRIVATE MAP_SHARED MAP_ANONYMOUS PROT_READ PROT_WRITE",
    "time": "tzset clock_gettime",
}


def guarded(tree: ast.Module) -> set[ast.AST]:
    """What stands inside of a `try`: whoever imports there says what else to do."""
    return {inner for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}


def test_nothing_asks_windows_for_what_it_lacks() -> None:
    found = []
    for path in PACKAGED:
        tree = parse(path)
        safe = guarded(tree)
        for node in ast.walk(tree):
            modules = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            if isinstance(node, ast.ImportFrom):
                modules = {node.module or ""}
            if modules & POSIX_MODULES and node not in safe:
                found.append(f"{named(path)} imports {' '.join(modules & POSIX_MODULES)}")
            if isinstance(node, ast.Attribute) and node.attr in POSIX_NAMES.get(ast.unparse(node.value), "").split():
                found.append(f"{named(path)} uses {ast.unparse(node)}")
    assert found == []
