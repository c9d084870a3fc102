"""Read settings from a TOML file; options on the command line take precedence.

A file has options by their names without dashes, in sections of any name or in none: `learning_rate = 2e-4`, `sdpa =
true`, `optimizer_args = ["weight_decay=0.01"]`.
"""

import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import toml

from wan_train.cli import groups, is_single, nearest, options, parse, switches
from wan_train.errors import InputError

Settings = TypeVar("Settings")

FLAG = "--config_file"
# Options not saved in a configuration: secrets, and options of a single start of a run.
UNSAVED = (
    "wandb_api_key",
    "huggingface_token",
    "config_file",
    "resume",
    "resume_anyway",
    "resume_from_huggingface",
    "show_timesteps",
    "profile",
)


def with_config_file(argv: Sequence[str], alone: Mapping[str, bool]) -> list[str]:
    """Return the command line with the options of its `--config_file` prepended, so that explicit options win.

    `alone` maps every known flag to whether it takes no value. Raises InputError for an unreadable file, and for an
    unknown key or a value of the wrong type.
    """
    path = named_file(argv, FLAG)
    if path is None:
        return list(argv)
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise InputError(f"{FLAG} {path} cannot be read: {problem.strerror or problem}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise InputError(f"{FLAG} {path} is not TOML: {problem}") from None
    return [*words_of(_flattened(content), alone, f"{FLAG} {path}"), *argv]


def words_of(values: Iterable[tuple[str, Any]], alone: Mapping[str, bool], where: str) -> list[str]:
    """Convert options by name to command line words. Raises InputError, naming `where`, for an unknown option."""
    words: list[str] = []
    seen: set[str] = set()
    for key, value in values:
        flag = f"--{key}"
        if flag not in alone or flag == FLAG:
            known = [name.removeprefix("--") for name in alone]
            raise InputError(f"{where}: unknown option {key}{nearest(key, known)}")
        if key in seen:
            raise InputError(f"{where}: {key} is given twice")
        seen.add(key)
        words += _words(flag, value, where, alone=alone[flag])
    return words


def from_values(settings: type[Settings], values: Mapping[str, Any], where: str) -> Settings:
    """Make settings from options by name; None means not given. Raises InputError, naming `where`, as on a command
    line.

    A list for an option with a single value is joined with commas, as in `--timesteps 1000,500`.
    """
    single = {field.name for group in groups(settings).values() for field, _, hint in options(group) if is_single(hint)}
    given = {name: _plain(value, single=name in single) for name, value in values.items() if value is not None}
    return parse(settings, words_of(given.items(), switches(settings), where))


def _plain(value: Any, *, single: bool) -> Any:
    if not isinstance(value, list | tuple):
        return value
    return ",".join(map(str, value)) if single else [str(item) for item in value]


def named_file(argv: Sequence[str], flag: str) -> str | None:
    """Return the value of a flag on the command line, the last one if repeated; None if it is not given."""
    found = None
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == flag:
            found = following
        elif word.startswith(f"{flag}="):
            found = word.removeprefix(f"{flag}=")
    return found


def _flattened(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flattened(value)
        else:
            yield key, value


def _words(flag: str, value: Any, where: str, *, alone: bool) -> list[str]:
    if alone != isinstance(value, bool):
        wanted = "true or false" if alone else "a value"
        raise InputError(f"{where}: {flag.removeprefix('--')} must be {wanted}, not {value!r}")
    if alone:
        return [flag] if value else []
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)] if value else []
    return [f"{flag}={value}"]


def configuration_text(settings: Any, **changes: Any) -> str:
    """Return a configuration file with the non-default options of these settings, with some changes."""
    return toml.dumps(changed_options(settings, **changes))


def changed_options(settings: Any, **changes: Any) -> dict[str, dict[str, Any]]:
    """Return by group the options that are not at their default, with some changes, excluding `UNSAVED`."""
    sections: dict[str, dict[str, Any]] = {}
    for name, group in groups(type(settings)).items():
        values = getattr(settings, name)
        rows = {}
        for field, _, _ in options(group):
            value = changes.get(field.name, getattr(values, field.name))
            if field.name not in UNSAVED and value != field.default and value is not None:
                rows[field.name] = list(value) if isinstance(value, tuple) else value
        if rows:
            sections[name] = rows
    return sections
