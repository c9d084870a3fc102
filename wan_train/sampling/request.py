"""A wish for one video, and the prompt files that state them."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from wan_train.cli import InputError, nearest
from wan_train.log import get_logger
from wan_train.models.variants import FRAME_STEP, LATENT_CHANNELS, SIZE_STEP, VAE_STRIDE, Variant

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


# The letters of a prompt line: which field they set and how their value is read.
_LETTERS: dict[str, tuple[str, Callable[[str], object]]] = {
    "w": ("width", _whole(16, 8192)),
    "h": ("height", _whole(16, 8192)),
    "f": ("frames", _whole(1, 4096)),
    "d": ("seed", _whole(0, 2**63 - 1)),
    "s": ("steps", _whole(1, MAX_STEPS)),
    "l": ("guidance", _number(0, 1000)),
    "fs": ("shift", _number(1e-3, 1000)),
    "n": ("negative_prompt", str),
}
_IGNORED = ("g",)  # embedded guidance, which Wan does not have
_ELSEWHERE = ("i", "ei", "cn", "ci", "cim", "of")  # images and control, which these tasks do not take

_OPTION = re.compile(r"(?:^|\s)--([A-Za-z]\w*)(?=\s|$)")


def parse_line(line: str, defaults: SampleRequest) -> SampleRequest:
    """A prompt line, `words --w 832 --h 480 ...`, over the defaults.

    Raises InputError for an unknown letter, a value that does not read or is out of range, or an empty prompt.
    """
    marks = list(_OPTION.finditer(line))
    starts = [mark.start() for mark in marks] + [len(line)]
    prompt = line[: starts[0]].strip()
    if not prompt:
        raise InputError("a prompt line starts with the prompt: words --w 832 --h 480")
    changes: dict[str, object] = {"prompt": prompt}
    for mark, end in zip(marks, starts[1:], strict=True):
        letter = mark[1].lower()
        text = line[mark.end() : end].strip()
        if letter in _IGNORED:
            continue
        if letter in _ELSEWHERE:
            raise InputError(f"--{letter} belongs to tasks that take an image or a control video, not to text-to-video")
        if letter not in _LETTERS:
            raise InputError(
                f"unknown option --{letter} in a prompt line{nearest(letter, _LETTERS)}: known are {_known()}"
            )
        field, read = _LETTERS[letter]
        try:
            changes[field] = read(text)
        except ValueError as problem:
            why = str(problem) if "takes" in str(problem) else "takes a number"
            raise InputError(f"--{letter} {text or '(nothing)'} in a prompt line: it {why}") from None
    return fitted(replace(defaults, **changes))  # type: ignore[arg-type]


def _known() -> str:
    return " ".join(f"--{letter}" for letter in _LETTERS)


def read_prompts(path: str | Path, defaults: SampleRequest) -> list[SampleRequest]:
    """The requests of a prompt file: a line each; empty lines and those that begin with # are passed over."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"cannot read the prompts {path}: {getattr(problem, 'strerror', None) or problem}") from None
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            requests.append(parse_line(line.strip(), defaults))
        except InputError as problem:
            raise InputError(f"{path}, line {number}: {problem}") from None
    if not requests:
        raise InputError(f"{path} holds no prompt: write one to a line")
    return requests
