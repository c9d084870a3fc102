"""Command line parsing into settings dataclasses.

A setting is a dataclass field made by `option`; a group of settings is a dataclass; a tool is a dataclass of groups.
`run` is the only function that uses argparse. Nothing here imports torch, so that `--help` is fast.
"""

import argparse
import dataclasses
import difflib
import importlib
import math
import os
import re
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from wan_train.errors import InputError, RunError, Stopped

Settings = TypeVar("Settings")
_ARTICLES = {int: "an integer", float: "a number"}


@dataclass(frozen=True)
class Option:
    """The command line properties of a field; see `option`."""

    help: str
    choices: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    shortcuts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    minimum: float | None = None
    maximum: float | None = None
    required: bool = False
    metavar: str | None = None
    expands: str = ""
    positional: bool = False


def option(
    default: Any = None,
    help: str = "",
    *,
    choices: Iterable[str] = (),
    flags: Sequence[str] = (),
    shortcuts: Mapping[str, str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    metavar: str | None = None,
    required: bool = False,
    expands: str = "",
    traits: object = None,
) -> Any:
    """Declare a setting as a dataclass field.

    The field's name is the flag (`--name`) and its annotation the type: `bool` is a switch, `tuple[int, int]` takes two
    values, `tuple[str, ...]` any number. `flags` are aliases; `shortcuts` are switches that set this field to a fixed
    value (`{"--sdpa": "torch"}`); `minimum` and `maximum` are inclusive. `expands` is "module:function" for a value
    that names a file of options: the function takes the command line and returns it with these prepended. `traits` is
    metadata for other readers of the field.
    """
    lists = tuple(choices), tuple(flags), dict(shortcuts or {})
    described = Option(help, *lists, minimum, maximum, required, metavar, expands)
    return dataclasses.field(default=default, metadata={"option": described, "traits": traits})


def positional(help: str) -> Any:
    """Declare one or more positional arguments, a field of type `tuple[str, ...]`."""
    return dataclasses.field(default=(), metadata={"option": Option(help, required=True, positional=True)})


@dataclass(frozen=True)
class Tool:
    """A command: its name, its dataclass of settings groups, and its main function."""

    program: str
    description: str
    settings: type
    main: str  # "module:function", imported after the command line has been validated


def nearest(name: str, known: Iterable[str]) -> str:
    """Return '; did you mean X?' for the closest known name, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]}?" if match else ""


def choose(choice_name: str, name: str, table: Mapping[str, Any]) -> Any:
    """Return the entry `name` of a table of choices. Raises InputError that lists the choices for an unknown name."""
    if name not in table:
        raise InputError(f"unknown {choice_name} {name!r}: known are {', '.join(map(str, table))}")
    return table[name]


def parse(
    settings: type[Settings], argv: Sequence[str] | None = None, *, program: str = "", about: str = ""
) -> Settings:
    """Parse the command line into an instance of `settings`, a dataclass whose fields are groups of options."""
    parser = _parser(settings, program, about)
    words = _with_pairs_split(settings, sys.argv[1:] if argv is None else argv)
    _require_one_shortcut(settings, words)
    actions = parser._option_string_actions
    for field, described, _ in _declared(settings):
        if described.expands and any(word.partition("=")[0] in spellings(field, described) for word in words):
            words = _imported(described.expands)(words, switches(settings))
    values, unknown = parser.parse_known_args(words)
    if unknown:
        name = unknown[0].split("=")[0]
        raise InputError(f"unknown option {name}{nearest(name, actions)} (--help lists all options)")
    return settings(**{group: _build(kind, vars(values)) for group, kind in groups(settings).items()})


def run(tool: Tool, argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the tool; exit code 2 and one line on stderr for bad input, 1 for a failure."""
    try:
        settings: Any = parse(tool.settings, argv, program=tool.program, about=tool.description)
        _imported(tool.main)(settings)
    except (InputError, RunError) as problem:
        if os.environ.get("WAN_TRAIN_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2 if isinstance(problem, InputError) else 1
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def groups(settings: type) -> dict[str, type]:
    """Return the groups of a tool's settings: field name to dataclass."""
    hints: dict[str, type] = get_type_hints(settings)
    return {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}


def options(group: type) -> list[tuple[dataclasses.Field[Any], Option, Any]]:
    """Return the options of a group: field, description and annotated type of each."""
    hints = get_type_hints(group)
    return [(f, f.metadata["option"], hints[f.name]) for f in dataclasses.fields(group) if "option" in f.metadata]


def _declared(settings: type) -> list[tuple[dataclasses.Field[Any], Option, Any]]:
    """Return the options of all groups of a tool's settings."""
    return [entry for group in groups(settings).values() for entry in options(group)]


def spellings(field: dataclasses.Field[Any], described: Option) -> tuple[str, ...]:
    """Return the spellings of an option, aliases last."""
    return (field.name if described.positional else f"--{field.name}", *described.flags)


def switches(settings: type) -> dict[str, bool]:
    """Return every flag of a tool's settings, and whether it takes no value."""
    return {flag: action.nargs == 0 for flag, action in _parser(settings, "", "")._option_string_actions.items()}


def is_single(hint: Any) -> bool:
    """Return whether an option of this type takes a single value."""
    return value_type(hint)[1] is None


def _with_pairs_split(settings: type, words: Sequence[str]) -> list[str]:
    """Split 1280*720 or 1280x720 into two words after an option that takes two integers."""
    flags = {f for entry in _declared(settings) if value_type(entry[2]) == (int, 2) for f in spellings(*entry[:2])}
    split: list[str] = []
    for word in words:
        flag, _, value = word.rpartition("=")
        pair = re.fullmatch(r"(\d+)[*x](\d+)", value) if (flag or "".join(split[-1:])) in flags else None
        split += [*filter(None, [flag]), *pair.groups()] if pair else [word]
    return split


def _require_one_shortcut(settings: type, words: Sequence[str]) -> None:
    """Raise InputError for two switches that set the same field."""
    for field, described, _ in _declared(settings):
        given = [flag for flag in described.shortcuts if flag in words]
        if len(given) > 1:
            raise InputError(f"{given[0]} and {given[1]} both set --{field.name}: give one of them")


def _imported(name: str) -> Any:
    """Import the function named by "module:function"."""
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the options)")


def _parser(settings: type, program: str, about: str) -> _Parser:
    parser = _Parser(prog=program or None, description=about, allow_abbrev=False)
    for group in groups(settings).values():
        section = parser.add_argument_group(title(group))
        for field, described, hint in options(group):
            _add(section, field, described, hint)
    return parser


def _add(section: Any, field: dataclasses.Field[Any], described: Option, hint: Any) -> None:
    kind, count = value_type(hint)
    flags = spellings(field, described)
    default = "" if described.required or not shown(field.default) else f" (default {field.default})"
    allowed = f" One of: {', '.join(described.choices)}." if described.choices else ""
    about = f"{described.help}{allowed}{default}".replace("%", "%%")
    shared = {"dest": field.name, "default": argparse.SUPPRESS, "help": about}
    if kind is bool:
        section.add_argument(*flags, action="store_true", **shared)
        return
    if described.positional:
        section.add_argument(*flags, nargs="+", help=about)
        return
    # Without a metavar argparse would print all choices twice.
    metavar = described.metavar or kind.__name__.upper()
    section.add_argument(
        *flags,
        type=_converter(kind, described),
        nargs=count,
        metavar=metavar if count != 2 else (tuple(metavar.split()) if " " in metavar else (metavar, metavar)),
        required=described.required,
        **shared,
    )
    for flag, value in described.shortcuts.items():
        section.add_argument(
            flag,
            dest=field.name,
            action="store_const",
            const=value,
            default=argparse.SUPPRESS,
            help=f"same as --{field.name} {value}",
        )


def value_type(hint: Any) -> tuple[type, int | str | None]:
    """Return the scalar type of an annotation and argparse's nargs."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        return parts[0], "*" if parts[-1] is Ellipsis else len(parts)
    return hint, None


def _converter(value_kind: type, described: Option) -> Any:
    def convert(text: str) -> Any:
        try:
            value = value_kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {_ARTICLES.get(value_kind, 'text')}, got {text!r}") from None
        if described.choices and value not in described.choices:
            known = ", ".join(described.choices)
            raise argparse.ArgumentTypeError(
                f"unknown value {text!r}{nearest(text, described.choices)}; known are {known}"
            )
        if not isinstance(value, str) and not _in_range(value, described):
            raise argparse.ArgumentTypeError(f"{text} is out of range: expected {bounds(described) or 'a number'}")
        return value

    return convert


def _in_range(value: float, described: Option) -> bool:
    low = -math.inf if described.minimum is None else described.minimum
    high = math.inf if described.maximum is None else described.maximum
    return low <= value <= high  # false for NaN


def bounds(described: Option) -> str:
    """Return the range of a number in words, or an empty string."""
    if described.minimum is not None and described.maximum is not None:
        return f"{described.minimum:g} to {described.maximum:g}"
    if described.minimum is not None:
        return f"{described.minimum:g} or more"
    return f"at most {described.maximum:g}" if described.maximum is not None else ""


def _build(group: type, values: Mapping[str, Any]) -> Any:
    given = {}
    for field, _, _ in options(group):
        if field.name in values:
            value = values[field.name]
            given[field.name] = tuple(value) if isinstance(value, list) else value
    return group(**given)


def title(group: type) -> str:
    """Return the title of a group of settings."""
    return (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")


def shown(default: Any) -> str:
    """Return a default as shown in the help; empty if it carries no information."""
    if default is None or default is False or default in ("", ()):
        return ""
    return f"`{' '.join(map(str, default)) if isinstance(default, tuple) else default}`"
