"""Read prompt files (text, TOML and JSON) into entries with file and line.

`grammar` interprets their values.
"""

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_train.errors import InputError


@dataclass(frozen=True)
class Entry:
    """One prompt of a file: a prompt line or a table; `where` is its file and line."""

    content: str | Mapping[str, Any]
    where: str


def read_entries(path: str | Path) -> list[Entry]:
    """Return the prompts of a .toml, .json or text file, in order. InputError if it cannot be read or has none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(
            f"cannot read the prompt file {path}: {getattr(problem, 'strerror', None) or problem}"
        ) from None
    read, hint = _READERS.get(Path(path).suffix.lower(), (_read_lines, "write one per line"))
    entries = read(str(path), text)
    if not entries:
        raise InputError(f"{path} has no prompts: {hint}")
    return entries


def _read_lines(path: str, text: str) -> list[Entry]:
    """Read one prompt per line; empty lines and lines that start with # are skipped."""
    numbered = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [Entry(line, f"{path}, line {number}") for number, line in numbered if line and not line.startswith("#")]


def _read_toml(path: str, text: str) -> list[Entry]:
    """Read `[prompt]`, the defaults of all `[[prompt.subset]]`; without a subset it is a prompt itself."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise InputError(f"{path} is not valid TOML: {problem}") from None
    shared = data.pop("prompt", None)
    if not isinstance(shared, dict) or data:
        odd = f"; it also has {', '.join(data)}" if data else ""
        raise InputError(f"{path} must have one table, [prompt], with a [[prompt.subset]] for each prompt{odd}")
    subsets = shared.pop("subset", None)
    if subsets is None:
        return [Entry(shared, f"{path}, [prompt]{_line_of(text, 'prompt')}")]
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise InputError(f"{path}: subset must be a list of tables: write [[prompt.subset]] above each prompt")
    heads = [number for number, line in enumerate(text.splitlines(), 1) if _SUBSET.match(line)]
    lines = heads if len(heads) == len(subsets) else [0] * len(subsets)
    return [
        Entry({**shared, **subset}, f"{path}, [[prompt.subset]] {index}{f', line {line}' if line else ''}")
        for index, (subset, line) in enumerate(zip(subsets, lines, strict=True), 1)
    ]


_SUBSET = re.compile(r"\s*\[\[\s*prompt\s*\.\s*subset\s*\]\]")


def _line_of(text: str, table: str) -> str:
    heads = [number for number, line in enumerate(text.splitlines(), 1) if line.strip() == f"[{table}]"]
    return f", line {heads[0]}" if heads else ""


def _read_json(path: str, text: str) -> list[Entry]:
    """Read a list of objects or prompt lines."""
    decoder = json.JSONDecoder()
    try:
        whole = json.loads(text)
        if not isinstance(whole, list):
            raise InputError(f'{path} is not a list: write [{{"prompt": "words", "width": 832}}, ...]')
        entries, position = [], text.index("[") + 1
        for number, item in enumerate(whole, 1):
            position = _skip(text, position)
            where = f"{path}, prompt {number}, line {text.count(chr(10), 0, position) + 1}"
            if not isinstance(item, str | dict):
                raise InputError(f"{where}: a prompt must be an object or a string, not {json.dumps(item)}")
            entries.append(Entry(item, where))
            _, position = decoder.raw_decode(text, position)
        return entries
    except json.JSONDecodeError as problem:
        raise InputError(f"{path}, line {problem.lineno}: not valid JSON ({problem.msg})") from None


def _skip(text: str, position: int) -> int:
    """Return the next position after blanks and commas."""
    match = re.compile(r"[\s,]*").match(text, position)
    return match.end() if match else position


_READERS: dict[str, tuple[Callable[[str, str], list[Entry]], str]] = {
    ".toml": (_read_toml, "write [[prompt.subset]] and prompt = ... for each"),
    ".json": (_read_json, 'write [{"prompt": "words"}]'),
}
