"""The grammar in which prompt lines, tables and files state what is wished for."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.one_frame import read_one_frame
from wan_train.sampling.prompt_files import read_entries
from wan_train.sampling.prompt_line import Given, split_line, strays
from wan_train.sampling.request import MAX_STEPS, SampleRequest, checked, fitted, read_layers, read_numbers
from wan_train.sampling.settings import CFG_SKIP_MODES, MAX_SEED, NOISE_DEVICES, SLG_MODES, SOLVER_NAMES

log = get_logger(__name__)


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError(f"takes {low} to {high}")
        return value

    return read


def _size(text: str) -> tuple[int, ...]:
    size = tuple(map(_whole(16, 8192), text.replace(",", " ").split()))
    if len(size) != 2:
        raise ValueError("takes width and height")
    return size


def _number(low: float, high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise ValueError(f"takes {low:g} to {high:g}")
        return value

    return read


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"takes one of {', '.join(names)}")
        return text

    return read


def _paths(text: str) -> tuple[str, ...]:
    return tuple(text.splitlines())


def _switch(text: str) -> bool:
    """A switch is on by being there; tables say true or false."""
    if text.lower() not in ("", "true", "false"):
        raise ValueError("takes nothing after it, or true or false")
    return text.lower() != "false"


@dataclass(frozen=True)
class _Value:
    """What a prompt says of one field of a request ("size" is two): its name in tables, and how its text is read."""

    field: str
    name: str
    read: Callable[[str], object]


# What a prompt line says: the letters that are usual, and the generator's options by their names.
_VALUES = {
    "w": _Value("width", "width", _whole(16, 8192)),
    "h": _Value("height", "height", _whole(16, 8192)),
    "f": _Value("frames", "frame_count", _whole(1, 4096)),
    "d": _Value("seed", "seed", _whole(0, MAX_SEED)),
    "s": _Value("steps", "sample_steps", _whole(1, MAX_STEPS)),
    "l": _Value("guidance", "cfg_scale", _number(0, 1000)),
    "guidance_scale_high_noise": _Value("guidance_high_noise", "guidance_scale_high_noise", _number(0, 1000)),
    "fs": _Value("shift", "discrete_flow_shift", _number(1e-3, 1000)),
    "n": _Value("negative_prompt", "negative_prompt", str),
    "video_size": _Value("size", "video_size", _size),
    "sample_solver": _Value("solver", "sample_solver", _one_of(SOLVER_NAMES)),
    "timesteps": _Value("timesteps", "timesteps", read_numbers),
    "rand_device": _Value("rand_device", "rand_device", _one_of(NOISE_DEVICES)),
    "i": _Value("image_path", "image_path", str),
    "ei": _Value("end_image_path", "end_image_path", str),
    "ci": _Value("control_images", "control_image_path", _paths),
    "of": _Value("one_frame", "one_frame", read_one_frame),
    "exact_size": _Value("exact_size", "exact_size", _switch),
    "video_path": _Value("video_path", "video_path", str),
    "denoising_strength": _Value("denoising_strength", "denoising_strength", _number(1e-3, 1)),
    "cfg_skip_mode": _Value("cfg_skip_mode", "cfg_skip_mode", _one_of(CFG_SKIP_MODES)),
    "cfg_apply_ratio": _Value("cfg_apply_ratio", "cfg_apply_ratio", _number(0, 1)),
    "cfg_merge": _Value("cfg_merge", "cfg_merge", _switch),
    "slg_layers": _Value("slg_layers", "slg_layers", read_layers),
    "slg_mode": _Value("slg_mode", "slg_mode", _one_of(SLG_MODES)),
    "slg_scale": _Value("slg_scale", "slg_scale", _number(0, 1000)),
    "slg_start": _Value("slg_start", "slg_start", _number(0, 1)),
    "slg_end": _Value("slg_end", "slg_end", _number(0, 1)),
}
_IGNORED = {"g": "guidance_scale"}  # embedded guidance, which Wan does not have
# Control, which these tasks do not take.
_ELSEWHERE = {
    "cn": "control_video_path",
    "cim": "control_image_mask_path",
}
_REPEATED = ("ci",)  # what a line may say several times
_BY_NAME = {value.name: letter for letter, value in _VALUES.items()} | {
    name: letter for letter, name in (_IGNORED | _ELSEWHERE).items()
}


@dataclass(frozen=True)
class Grammar:
    """What the users of a tool may say: spellings that mean something else there, and what they may not say.

    `strict` refuses what looks like an option and is none.
    """

    spellings: Mapping[str, str]
    refused: Mapping[str, str]
    strict: bool = False


# In the generator of the tools that these lines come from, --g is the guidance; in their training it is embedded.
GENERATOR = Grammar(
    spellings={
        "g": "l",
        "guidance_scale": "l",
        "infer_steps": "s",
        "flow_shift": "fs",
        "video_length": "f",
        "negative_prompt": "n",
        "seed": "d",
        "image_path": "i",
        "end_image_path": "ei",
        "control_image_path": "ci",
        "one_frame_inference": "of",
    },
    refused={},
)
PREVIEW = Grammar(spellings={}, refused={"video_path": "previews begin with noise: leave it to the generator"})


def parse_line(
    line: str, defaults: SampleRequest, grammar: Grammar = PREVIEW, *, where: str = "a prompt line"
) -> SampleRequest:
    """A prompt line, `words --w 832 --h=480 ...`, over the defaults; `where` says in a warning which it is.

    Raises InputError for an unknown letter or one that comes twice, a value that does not read or is out of range, or
    an empty prompt.
    """
    check_text(line, grammar, where, is_line=True)
    given: dict[str, Given] = {}
    read = split_line(line)
    for option in read.options:
        letter, text = grammar.spellings.get(option.name, option.name), option.text
        if letter in given:
            if letter not in _REPEATED:
                raise InputError(f"--{letter} comes twice in a prompt line: keep one of them")
            text = f"{given[letter].text}\n{text}"
        given[letter] = Given(f"--{letter}", text)
    return _request(read.words, given, defaults, grammar, " ".join(f"--{name}" for name in _VALUES))


def check_text(text: str, grammar: Grammar, where: str, *, is_line: bool = False) -> None:
    """Warn of what looks like an option in a prompt line, or in a text that takes none, and stays part of the prompt.

    InputError for it where the grammar is strict.
    """
    for stray in strays(text, {*_BY_NAME, *_BY_NAME.values(), *grammar.spellings}, is_line=is_line):
        way_out = "write a blank and two hyphens before its name" if is_line else "options of it are given beside it"
        told = f'"{stray}" looks like an option and is part of the prompt: {way_out}'
        if grammar.strict:
            raise InputError(f"{told}, or leave out --strict_prompts")
        log.warning("%s: %s (%s)", where, told, text.strip())


def parse_table(
    table: Mapping[str, object], defaults: SampleRequest, grammar: Grammar = PREVIEW, *, where: str = "a prompt"
) -> SampleRequest:
    """A prompt as a table: `prompt`, and `width`, `frame_count` ... or the letters of a prompt line, over the defaults.

    Raises InputError as `parse_line` does.
    """
    prompt = table.get("prompt", "")
    given: dict[str, Given] = {}
    for name, value in table.items():
        letter = grammar.spellings.get(name) or _BY_NAME.get(name, name)
        if letter in given:
            raise InputError(f"{given[letter].name} and {name} say the same: keep one of them")
        if letter in ("prompt", "n") and not isinstance(value, str):
            raise InputError(f"{name} = {value}: it takes text")
        if letter in ("prompt", "n"):
            check_text(str(value), grammar, where)
        if letter != "prompt":
            given[letter] = Given(name, _as_text(value))
    names = ", ".join(value.name for value in _VALUES.values())
    return _request(str(prompt).strip(), given, defaults, grammar, names)


def _as_text(value: object) -> str:
    """A value of a table as a line would have it."""
    if isinstance(value, list):
        return "\n".join(map(str, value)) if all(isinstance(item, str) for item in value) else ",".join(map(str, value))
    return str(value)


def _meant(name: str, letter: str) -> str:
    """'; did you mean X?' for an unknown name, X as it is written there: in a line as `--w`, elsewhere as `width`."""
    match = difflib.get_close_matches(letter, _BY_NAME, n=1)
    if not match:
        return ""
    return f"; did you mean {f'--{_BY_NAME[match[0]]}' if name.startswith('--') else match[0]}?"


def _request(
    prompt: str, given: Mapping[str, Given], defaults: SampleRequest, grammar: Grammar, known: str
) -> SampleRequest:
    """The defaults with what was given by letter; `known` lists the names for a message."""
    if not prompt:
        raise InputError("a prompt starts with its words: a cat in the rain --w 832 --h 480")
    changes: dict[str, object] = {"prompt": prompt}
    for letter, value in given.items():
        if letter in _IGNORED:
            log.info("%s is passed over: Wan has no embedded guidance; --l (cfg_scale) is its guidance", value.name)
        elif letter in _ELSEWHERE:
            raise InputError(
                f"{value.name} belongs to tasks that take a control video or picture, not to {defaults.variant.name}"
            )
        elif letter in grammar.refused:
            raise InputError(f"{value.name}: {grammar.refused[letter]}")
        elif letter not in _VALUES:
            raise InputError(f"unknown option {value.name} of a prompt{_meant(value.name, letter)}: known are {known}")
        else:
            changes[_VALUES[letter].field] = _read(_VALUES[letter], value)
    if size := changes.pop("size", None):
        if beside := given.keys() & {"w", "h"}:
            raise InputError(f"{given['video_size'].name} and {given[min(beside)].name} say the same: keep one of them")
        changes["width"], changes["height"] = size  # type: ignore[misc]
    if "denoising_strength" in changes and not changes.get("video_path", defaults.video_path):
        raise InputError(
            f"{given['denoising_strength'].name} says how much of a video_path is made anew: give that too"
        )
    if "steps" in changes and "timesteps" not in changes:
        changes["timesteps"] = ()  # a number of steps takes the place of levels that hold for all lines
    return fitted(checked(replace(defaults, **changes)))  # type: ignore[arg-type]


def _read(value: _Value, given: Given) -> object:
    try:
        return value.read(given.text)
    except ValueError as problem:
        why = str(problem) if "takes" in str(problem) else "takes a number"
        raise InputError(f"{given.name} {given.text or '(nothing)'} in a prompt: it {why}") from None


def read_prompts(path: str | Path, defaults: SampleRequest, grammar: Grammar = PREVIEW) -> list[SampleRequest]:
    """The requests of a prompt file: .toml, .json, or text with a prompt to a line. InputError names file and line."""
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
