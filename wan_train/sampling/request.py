"""A wish for one video, and the grammar in which prompt lines and tables state it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from wan_train.cli import InputError, nearest
from wan_train.log import get_logger
from wan_train.models.variants import FRAME_STEP, LATENT_CHANNELS, SIZE_STEP, VAE_STRIDE, Variant
from wan_train.sampling.prompt_files import read_entries

log = get_logger(__name__)

MAX_STEPS = 1000


@dataclass(frozen=True)
class SampleRequest:
    """Everything that decides a video but the weights. Sizes in pixels, `frames` 4n+1, `seed` None draws one."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    steps: int
    guidance: float
    shift: float
    seed: int | None = None
    solver: str = "unipc"
    cfg_skip_mode: str = "none"
    cfg_apply_ratio: float | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the latents."""
        frames = 1 + (self.frames - 1) // FRAME_STEP
        return LATENT_CHANNELS, frames, self.height // VAE_STRIDE, self.width // VAE_STRIDE


def fitted(request: SampleRequest) -> SampleRequest:
    """The request at a size and length that the model can make, with a warning where that is another."""
    width, height = (max(SIZE_STEP, side // SIZE_STEP * SIZE_STEP) for side in (request.width, request.height))
    frames = max(1, (request.frames - 1) // FRAME_STEP * FRAME_STEP + 1)
    if (width, height) != (request.width, request.height):
        asked = f"{request.width} wide, {request.height} high"
        log.warning("sizes go in steps of %d: %s becomes %d wide, %d high", SIZE_STEP, asked, width, height)
    if frames != request.frames:
        log.warning("frames are 4n+1: %d becomes %d", request.frames, frames)
    return replace(request, width=width, height=height, frames=frames)


def preview_defaults(variant: Variant) -> SampleRequest:
    """What a line of a prompt file means where it says nothing: small and short, but the task's shift and guidance."""
    return SampleRequest(
        prompt="",
        negative_prompt=variant.negative_prompt,
        width=256,
        height=256,
        frames=1,
        steps=20,
        guidance=variant.guidance,
        shift=variant.shift,
    )


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError(f"takes {low} to {high}")
        return value

    return read


def _number(low: float, high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise ValueError(f"takes {low:g} to {high:g}")
        return value

    return read


@dataclass(frozen=True)
class _Value:
    """What a prompt says of one field: its name in tables, and how its text is read."""

    field: str
    name: str
    read: Callable[[str], object]


# The letters of a prompt line.
_LETTERS = {
    "w": _Value("width", "width", _whole(16, 8192)),
    "h": _Value("height", "height", _whole(16, 8192)),
    "f": _Value("frames", "frame_count", _whole(1, 4096)),
    "d": _Value("seed", "seed", _whole(0, 2**63 - 1)),
    "s": _Value("steps", "sample_steps", _whole(1, MAX_STEPS)),
    "l": _Value("guidance", "cfg_scale", _number(0, 1000)),
    "fs": _Value("shift", "discrete_flow_shift", _number(1e-3, 1000)),
    "n": _Value("negative_prompt", "negative_prompt", str),
}
_IGNORED = {"g": "guidance_scale"}  # embedded guidance, which Wan does not have
# Images and control, which these tasks do not take.
_ELSEWHERE = {
    "i": "image_path",
    "ei": "end_image_path",
    "cn": "control_video_path",
    "ci": "control_image_path",
    "cim": "control_image_mask_path",
    "of": "one_frame",
}
_BY_NAME = {value.name: letter for letter, value in _LETTERS.items()} | {
    name: letter for letter, name in (_IGNORED | _ELSEWHERE).items()
}

_OPTION = re.compile(r"(?:^|\s)--([A-Za-z]\w*)(?=\s|$)")


@dataclass(frozen=True)
class _Given:
    """A value as somebody wrote it, and what he called it."""

    name: str
    text: str


def parse_line(line: str, defaults: SampleRequest) -> SampleRequest:
    """A prompt line, `words --w 832 --h 480 ...`, over the defaults.

    Raises InputError for an unknown letter or one that comes twice, a value that does not read or is out of range, or
    an empty prompt.
    """
    marks = list(_OPTION.finditer(line))
    starts = [mark.start() for mark in marks] + [len(line)]
    given: dict[str, _Given] = {}
    for mark, end in zip(marks, starts[1:], strict=True):
        letter = mark[1].lower()
        if letter in given:
            raise InputError(f"--{letter} comes twice in a prompt line: keep one of them")
        given[letter] = _Given(f"--{letter}", line[mark.end() : end].strip())
    return _request(line[: starts[0]].strip(), given, defaults, " ".join(f"--{letter}" for letter in _LETTERS))


def parse_table(table: Mapping[str, object], defaults: SampleRequest) -> SampleRequest:
    """A prompt as a table: `prompt`, and `width`, `frame_count` ... or the letters of a prompt line, over the defaults.

    Raises InputError as `parse_line` does.
    """
    prompt = table.get("prompt", "")
    given: dict[str, _Given] = {}
    for name, value in table.items():
        letter = _BY_NAME.get(name, name)
        if letter in given:
            raise InputError(f"{given[letter].name} and {name} say the same: keep one of them")
        if letter in ("prompt", "n") and not isinstance(value, str):
            raise InputError(f"{name} = {value}: it takes text")
        if letter != "prompt":
            given[letter] = _Given(name, str(value))
    return _request(str(prompt).strip(), given, defaults, ", ".join(value.name for value in _LETTERS.values()))


def _request(prompt: str, given: Mapping[str, _Given], defaults: SampleRequest, known: str) -> SampleRequest:
    """The defaults with what was given by letter; `known` lists the names for a message."""
    if not prompt:
        raise InputError("a prompt starts with its words: a cat in the rain --w 832 --h 480")
    changes: dict[str, object] = {"prompt": prompt}
    for letter, value in given.items():
        name, text = value.name, value.text
        if letter in _IGNORED:
            log.info("%s is passed over: Wan has no embedded guidance; --l (cfg_scale) is its guidance", name)
            continue
        if letter in _ELSEWHERE:
            raise InputError(f"{name} belongs to tasks that take an image or a control video, not to text-to-video")
        if letter not in _LETTERS:
            raise InputError(f"unknown option {name} of a prompt{nearest(letter, _BY_NAME)}: known are {known}")
        try:
            changes[_LETTERS[letter].field] = _LETTERS[letter].read(text)
        except ValueError as problem:
            why = str(problem) if "takes" in str(problem) else "takes a number"
            raise InputError(f"{name} {text or '(nothing)'} in a prompt: it {why}") from None
    return fitted(replace(defaults, **changes))  # type: ignore[arg-type]


def read_prompts(path: str | Path, defaults: SampleRequest) -> list[SampleRequest]:
    """The requests of a prompt file: .toml, .json, or text with a prompt to a line. InputError names file and line."""
    requests = []
    for entry in read_entries(path):
        try:
            if isinstance(entry.content, str):
                requests.append(parse_line(entry.content, defaults))
            else:
                requests.append(parse_table(entry.content, defaults))
        except InputError as problem:
            raise InputError(f"{entry.where}: {problem}") from None
    return requests
