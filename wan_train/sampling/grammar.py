"""Parse prompt lines, tables and files into requests."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.sampling.control_settings import REPLACED
from wan_train.sampling.options import first_of, sampling_options
from wan_train.sampling.prompt_files import read_entries
from wan_train.sampling.prompt_line import Given, lookalikes, split_line
from wan_train.sampling.request import SampleRequest, checked, fitted
from wan_train.sampling.settings import SamplingSettings
from wan_train.sampling.step_cache.settings import replaced_by
from wan_train.sampling.values import Read, make_reader

log = get_logger(__name__)


@dataclass(frozen=True)
class _Value:
    """A field of a request ("size" is two), its name in tables, and the reader of its text."""

    field: str
    name: str
    read: Read
    is_repeated: bool = False


@dataclass(frozen=True)
class _Vocabulary:
    """The options of prompts.

    `values` maps letters to fields, `letters` names in tables to letters, `options` names on the command line to
    letters, and `refused` letters to the reason why previews refuse them.
    """

    values: Mapping[str, _Value]
    letters: Mapping[str, str]
    options: Mapping[str, str]
    refused: Mapping[str, str]


_IGNORED = {"g": "guidance_scale"}  # embedded guidance, which Wan does not have
# Further names -> our letter; two are musubi-tuner's.
_OTHER_NAMES = {"control_path": "cn", "cim": "vace_mask", "control_image_mask_path": "vace_mask"}
# Messages list these first, in this order; the others follow in order of declaration.
_LISTED_FIRST = (
    *("w", "h", "f", "d", "s", "l", "guidance_scale_high_noise", "fs", "n", "video_size", "sample_solver"),
    *("timesteps", "rand_device", "i", "ei", "ci", "of"),
)


@cache
def _vocabulary(settings: type) -> _Vocabulary:
    """Return the vocabulary of a dataclass of sampling settings: its options, width and height."""
    declared = [option for option in sampling_options(settings) if option.name != "prompt"]
    values = {o.letter: _Value(o.field, o.table, o.reader, o.is_repeated) for o in declared}
    assert len(values) == len(declared), "two options share a letter"
    size = next(option for option in declared if option.name == "video_size")
    read_side = make_reader(int, size.described, maximum=size.traits.maximum)
    values |= {"w": _Value("width", "width", read_side), "h": _Value("height", "height", read_side)}
    values = {letter: values[letter] for letter in first_of(_LISTED_FIRST, list(values))}
    return _Vocabulary(
        values=values,
        letters={value.name: letter for letter, value in values.items()}
        | {name: letter for letter, name in _IGNORED.items()},
        options={option.name: option.letter for option in declared if option.letter != option.name},
        refused={o.letter: o.traits.not_in_previews for o in declared if o.traits.not_in_previews},
    )


@dataclass(frozen=True)
class Grammar:
    """The options that prompts of a tool may set: those of `settings`, a dataclass of sampling settings.

    Previews refuse some of them; the generator also accepts their command-line names. `strict` raises an error for
    text that looks like an option but is not one.
    """

    is_preview: bool
    settings: type = SamplingSettings
    strict: bool = False

    @property
    def spellings(self) -> Mapping[str, str]:
        """Alternative names, each with its letter."""
        # In musubi-tuner's generator --g is the guidance scale, in its trainer the embedded guidance.
        return _OTHER_NAMES | ({} if self.is_preview else {"g": "l", **_vocabulary(self.settings).options})

    @property
    def refused(self) -> Mapping[str, str]:
        """Letters of refused options, each with the reason."""
        return _vocabulary(self.settings).refused if self.is_preview else {}


GENERATOR = Grammar(is_preview=False)
PREVIEW = Grammar(is_preview=True)


def parse_line(
    line: str, defaults: SampleRequest, grammar: Grammar = PREVIEW, *, where: str = "a prompt line"
) -> SampleRequest:
    """Return the request of a prompt line, `words --w 832 --h=480 ...`, over the defaults.

    `where` names the line in warnings. Raises InputError for an unknown or repeated option, an invalid or out-of-range
    value, and an empty prompt.
    """
    check_text(line, grammar, where, is_line=True)
    given: dict[str, Given] = {}
    read, values, spellings = split_line(line), _vocabulary(grammar.settings).values, grammar.spellings
    for option in read.options:
        letter, text = spellings.get(option.name, option.name), option.text
        if letter in given:
            if letter not in values or not values[letter].is_repeated:
                raise InputError(f"--{letter} is given twice in a prompt line: keep one")
            text = f"{given[letter].text}\n{text}"
        given[letter] = Given(f"--{letter}", text)
    return _request(read.words, given, defaults, grammar, " ".join(f"--{name}" for name in values))


def check_text(text: str, grammar: Grammar, where: str, *, is_line: bool = False) -> None:
    """Warn about text that looks like an option but stays part of the prompt, or raise InputError if strict."""
    letters = _vocabulary(grammar.settings).letters
    for lookalike in lookalikes(text, {*letters, *letters.values(), *grammar.spellings}, is_line=is_line):
        way_out = "put a space and two hyphens before its name" if is_line else "give options separately"
        message = f'"{lookalike}" looks like an option but is part of the prompt: {way_out}'
        if grammar.strict:
            raise InputError(f"{message}, or leave out --strict_prompts")
        log.warning("%s: %s (%s)", where, message, text.strip())


def parse_table(
    table: Mapping[str, object], defaults: SampleRequest, grammar: Grammar = PREVIEW, *, where: str = "a prompt"
) -> SampleRequest:
    """Return the request of a table over the defaults; keys are `prompt`, and names such as `width` or letters.

    Raises InputError like `parse_line`.
    """
    prompt = table.get("prompt", "")
    given: dict[str, Given] = {}
    vocabulary, spellings = _vocabulary(grammar.settings), grammar.spellings
    for name, value in table.items():
        letter = spellings.get(name) or vocabulary.letters.get(name, name)
        if letter in given:
            raise InputError(f"{given[letter].name} and {name} set the same option: keep one")
        if letter in ("prompt", "n") and not isinstance(value, str):
            raise InputError(f"{name} = {value}: must be a string")
        if letter in ("prompt", "n"):
            check_text(str(value), grammar, where)
        if letter != "prompt":
            given[letter] = Given(name, _as_text(value))
    names = ", ".join(value.name for value in vocabulary.values.values())
    return _request(str(prompt).strip(), given, defaults, grammar, names)


def _as_text(value: object) -> str:
    """Return a table's value as text of a prompt line."""
    if isinstance(value, list):
        return "\n".join(map(str, value)) if all(isinstance(item, str) for item in value) else ",".join(map(str, value))
    return str(value)


def _meant(name: str, letter: str, letters: Mapping[str, str]) -> str:
    """Return " (did you mean X?)" for an unknown name, X as `--w` in a line and as `width` elsewhere, or nothing."""
    match = difflib.get_close_matches(letter, letters, n=1)
    if not match:
        return ""
    return f" (did you mean {f'--{letters[match[0]]}' if name.startswith('--') else match[0]}?)"


def _request(
    prompt: str, given: Mapping[str, Given], defaults: SampleRequest, grammar: Grammar, known: str
) -> SampleRequest:
    """Return the defaults with the given options, by letter; `known` lists the names for a message."""
    if not prompt:
        raise InputError("the prompt is empty: start with it, for example: a cat in the rain --w 832 --h 480")
    vocabulary, changes = _vocabulary(grammar.settings), dict[str, Any](prompt=prompt)
    for letter, value in given.items():
        if letter in _IGNORED:
            log.info("%s is ignored: Wan has no embedded guidance; use --l (cfg_scale)", value.name)
        elif letter in grammar.refused:
            raise InputError(f"{value.name}: {grammar.refused[letter]}")
        elif letter not in vocabulary.values:
            meant = _meant(value.name, letter, vocabulary.letters)
            raise InputError(f"unknown prompt option {value.name}{meant}; known options: {known}")
        else:
            changes[vocabulary.values[letter].field] = _read(vocabulary.values[letter], value)
    if size := changes.pop("size", None):
        if beside := given.keys() & {"w", "h"}:
            raise InputError(f"{given['video_size'].name} and {given[min(beside)].name} set the same option: keep one")
        changes["width"], changes["height"] = size
    if "denoising_strength" in changes and not changes.get("video_path", defaults.video_path):
        raise InputError(f"{given['denoising_strength'].name} requires video_path: give both, or leave it out")
    if "steps" in changes and "timesteps" not in changes:
        changes["timesteps"] = ()  # a number of steps replaces explicit timesteps of the defaults
    # Camera options, RIFLEx and the step cache of a line replace those of the defaults.
    replaced = {other for one in REPLACED.keys() & changes.keys() for other in REPLACED[one]}
    replaced |= replaced_by(changes["step_cache"]) if "step_cache" in changes else set()
    replaced |= {"riflex_freq_index"} if changes.get("riflex") is False else set()
    changes = {name: getattr(SampleRequest, name) for name in replaced} | changes
    return fitted(checked(replace(defaults, **changes)))


def _read(value: _Value, given: Given) -> object:
    try:
        return value.read(given.text)
    except ValueError as problem:
        reason = str(problem) if str(problem).startswith("must be") else "must be a number"
        raise InputError(f"{given.name} {given.text or '(nothing)'} in a prompt: {reason}") from None


def read_prompts(path: str | Path, defaults: SampleRequest, grammar: Grammar = PREVIEW) -> list[SampleRequest]:
    """Return the requests of a prompt file (.toml, .json, or one prompt per line). InputError names file and line."""
    requests = []
    for entry in read_entries(path):
        try:
            if isinstance(entry.content, str):
                requests.append(parse_line(entry.content, defaults, grammar, where=entry.where))
            else:
                requests.append(parse_table(entry.content, defaults, grammar, where=entry.where))
        except InputError as problem:
            raise InputError(f"{entry.where}: {problem}") from None
    return requests
