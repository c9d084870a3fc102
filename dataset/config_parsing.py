"""Parse the text of a dataset file into the values of its keys; errors name the file, the table and the key."""

import json
import tomllib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dataset.config_keys import IMAGE_KEYS, SHARED_KEYS, SOURCE_KEYS, VIDEO_KEYS
from wan_train.cli import nearest
from wan_train.errors import InputError


@contextmanager
def reading_text(source: Path) -> Iterator[None]:
    """Raise InputError if the text file read inside this context cannot be opened or is not UTF-8."""
    try:
        yield
    except OSError as problem:
        raise InputError(f"cannot read {source}: {problem.strerror or problem}") from None
    except UnicodeDecodeError:
        raise InputError(f"{source} is not UTF-8 text: save it as UTF-8") from None


def parse_file(source: Path) -> dict[str, Any]:
    """Return the tables of a TOML or `.json` file. Raises InputError, with the line, if it does not parse."""
    with reading_text(source):
        text = source.read_text(encoding="utf-8-sig")
    try:
        document = json.loads(text) if source.suffix.lower() == ".json" else tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise InputError(f"{source} is not valid TOML: {problem}") from None
    except json.JSONDecodeError as problem:
        raise InputError(f"{source} is not valid JSON: {problem}") from None
    if not isinstance(document, dict):
        raise InputError(f'{source}: expected an object with "datasets"')
    return document


def refuse_unknown(table: Mapping[str, Any], known: Collection[str], location: str, table_name: str) -> None:
    """Raise InputError for an unknown key or table, with the nearest known one."""
    for key in table:
        if key not in known:
            hint = nearest(key, known) or f"; valid names: {', '.join(known)}"
            raise InputError(f"{location}: unknown {table_name} {key}{hint}")


def convert(table: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Return the values of a table, each parsed by its key's reader. Raises InputError for invalid values."""
    readers = {**SHARED_KEYS, **SOURCE_KEYS, **VIDEO_KEYS, **IMAGE_KEYS}
    values = {}
    for key, value in table.items():
        try:
            values[key] = readers[key](value)
        except ValueError as problem:
            raise InputError(f"{location}: {key} = {value!r}: expected {problem}") from None
    return values
