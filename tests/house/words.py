"""Words that texts of the project leave out, and where they stand.

Help texts, raised messages, log calls, docs, docstrings and names of parameters use the field's standard terms. Text
between backticks is code or quoted input, and is not read. `python tests/house/words.py [FOLDER...]` lists the finds.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What to say, and the pattern of what not to say.
LEFT_OUT = {
    "CPU RAM, host memory": r"\bmain memory\b",
    "GPU memory, VRAM, device": r"\b(graphics )?cards?\b",
    "8-bit, int8, fp8": r"\b(eight|four|sixteen)[- ]bits?\b",
    "recompute, activation checkpointing": r"\b(comput|tak)\w+ again\b",
    "stochastic rounding": r"\bround\w*( \w+)? at random\b",
    "resume, resumed from, continue": r"\b(go|goes|going|went|gone) on\b",
    "default: X": r"[;,:] without (it|one|them)\b|\bwithout it\.?$|[\d;,] without (it|one|them)\b",
    "number of, at most N": r"\bso many\b",
    "parameters, elements; billion": r"\bthousand million\b|\b(float32|bfloat16|million|billion) numbers\b",
    "NaN or Inf": r"\bno number\b|\bnot a number\b",
    "image, frame": r"\bpictures?\b",
    "rope table": r"\bturned by\b|\brope rotations\b",
    "transfer stream": r"\blanes?\b",
    "evaluate, evaluation": r"\blook(s|ed)? at the (held-out|loss)|\b(a|one|first|next|two|each|last|every) looks?\b",
    "per channel, per token, block-wise": r"\beach by itself\b|\bapart\b(?! from)",
    "scale, effective scale alpha/rank": r"\bhow (much|strongly) (it|they|each|\w+ of them) counts?\b",
    "unmatched keys": r"\banswers? to\b",
    "is not a, has no": r"(?<!there )(?<!There )\b(is|are|was|were) no (?!longer|more|less|better|worse|different)\w+",
}
_PATTERNS = {say: re.compile(pattern, re.IGNORECASE) for say, pattern in LEFT_OUT.items()}
VAGUE_NAMES = ("what", "thing", "place", "kind", "turns")
LOG_CALLS = ("debug", "info", "warning", "error", "exception")
PRODUCT = ("wan_train", "networks", "dataset", "cache_tools", "generate", "examples", "benchmarks", "docs")
# The class that copies is called Lane, and docstrings tell things apart; users read of transfer streams and block-wise
# scales.
_ALLOWED = {("transfer stream", "docstring"), ("per channel, per token, block-wise", "docstring")}


@dataclass(frozen=True)
class Find:
    """A left-out word: in which kind of text, the file and line, what to say instead, and the words around it."""

    text_kind: str
    where: str
    say: str
    words: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text_kind}: ...{self.words}... (say: {self.say})"


def in_text(text_kind: str, where: str, text: str) -> Iterator[Find]:
    """Find left-out words in one text."""
    read = re.sub(r"``?[^`]*``?", "``", text)
    for say, pattern in _PATTERNS.items():
        if (say, text_kind) in _ALLOWED:
            continue
        for found in pattern.finditer(read):
            around = read[max(0, found.start() - 40) : found.end() + 30]
            yield Find(text_kind, where, say, " ".join(around.split()))


def in_code(path: Path, source: str) -> Iterator[Find]:
    """Find left-out words in the help texts, raised messages, log calls, docstrings and parameters of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from in_text("docstring", f"{path}:{getattr(node, 'lineno', 1)}", ast.get_docstring(node) or "")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            for argument in arguments:
                if argument.arg in VAGUE_NAMES and not _is_place(argument):
                    yield Find("parameter", f"{path}:{argument.lineno}", "what the parameter holds", argument.arg)
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield from _in_strings("raised message", path, node.exc)
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in LOG_CALLS:
                yield from _in_strings("log", path, node)
            if name in ("option", "positional"):
                yield from _in_strings("help", path, node)


def in_docs(path: Path, source: str) -> Iterator[Find]:
    """Find left-out words in a Markdown page, code left out."""
    fenced = False
    for number, line in enumerate(source.splitlines(), 1):
        fenced ^= line.startswith("```")
        if not fenced and not line.startswith("    "):
            yield from in_text("docs", f"{path}:{number}", line)


def find_all(folders: Iterable[str] = ()) -> list[Find]:
    """List all finds below the root, or below these folders of it."""
    wanted = tuple(folders)
    found: list[Find] = []
    for path in sorted([*ROOT.glob("*.py"), *(file for room in PRODUCT for file in (ROOT / room).rglob("*.py"))]):
        found += in_code(path.relative_to(ROOT), path.read_text(encoding="utf-8"))
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]):
        found += in_docs(path.relative_to(ROOT), path.read_text(encoding="utf-8"))
    return [find for find in found if not wanted or find.where.startswith(wanted)]


def _is_place(argument: ast.arg) -> bool:
    """Whether it is a `Place`, a process among all."""
    return isinstance(argument.annotation, ast.Name) and argument.annotation.id == "Place"


def _in_strings(text_kind: str, path: Path, node: ast.AST) -> Iterator[Find]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield from in_text(text_kind, f"{path}:{inner.lineno}", inner.value)


if __name__ == "__main__":
    for find in find_all(sys.argv[1:]):
        print(find)
