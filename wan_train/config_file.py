"""Settings in a TOML file, in place of a long command line; what is on the command line wins.

A file has options by their names without dashes, in sections of any name or in none: `learning_rate = 2e-4`,
`sdpa = true`, `optimizer_args = ["weight_decay=0.01"]`.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import toml

from wan_train.cli import InputError, groups, nearest, options

FLAG = "--config_file"
# What a saved configuration leaves out: secrets, and what belongs to one start of the run.
UNSAVED = (
    "wandb_api_key",
    "huggingface_token",
    "config_file",
    "resume",
    "resume_anyway",
    "resume_from_huggingface",
    "show_timesteps",
)


def with_config_file(argv: Sequence[str], switches: Mapping[str, bool]) -> list[str]:
    """The command line with what its `--config_file` holds in front of it, so that what was given itself wins.

    `switches` has every known flag, and whether it stands alone. InputError for a file that cannot be read, and for a
    key or a kind of value that no option takes.
    """
    path = _named_file(argv)
    if path is None:
        return list(argv)
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise InputError(f"{FLAG} {path} cannot be read: {problem.strerror or problem}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise InputError(f"{FLAG} {path} is not TOML: {problem}") from None
    words: list[str] = []
    seen: set[str] = set()
    for key, value in _flattened(content):
        flag = f"--{key}"
        if flag not in switches or flag == FLAG:
            known = [name.removeprefix("--") for name in switches]
            raise InputError(f"{FLAG} {path}: unknown option {key}{nearest(key, known)}")
        if key in seen:
            raise InputError(f"{FLAG} {path}: {key} is there twice")
        seen.add(key)
        words += _words(flag, value, path, alone=switches[flag])
    return [*words, *argv]


def _named_file(argv: Sequence[str]) -> str | None:
    found = None
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == FLAG:
            found = following
        elif word.startswith(f"{FLAG}="):
            found = word.removeprefix(f"{FLAG}=")
    return found


def _flattened(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flattened(value)
        else:
            yield key, value


def _words(flag: str, value: Any, path: str, *, alone: bool) -> list[str]:
    if alone != isinstance(value, bool):
        wanted = "true or false" if alone else "a value"
        raise InputError(f"{FLAG} {path}: {flag.removeprefix('--')} takes {wanted}, not {value!r}")
    if alone:
        return [flag] if value else []
    if isinstance(value, list):
        return [flag, *map(str, value)] if value else []
    return [f"{flag}={value}"]


def configuration_text(settings: Any, **changes: Any) -> str:
    """A configuration file that gives these settings again, some changed: each option that is not at its default."""
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
    return toml.dumps(sections)
