"""Check the control options of a request, and fit the length of the video to them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dataset.reading.frames import floor_frames
from dataset.reading.media import probe
from wan_train.conditions.camera import camera_path, read_camera_file
from wan_train.errors import InputError, first_given
from wan_train.log import get_logger
from wan_train.models.variants import ControlInputs, Variant
from wan_train.sampling.control_settings import CAMERA_SPEED, ControlOptions
from wan_train.sampling.images import check_image
from wan_train.sampling.videos import Size, frame_indices, is_still

log = get_logger(__name__)


@dataclass(frozen=True)
class _ControlInput:
    """An option of control models: whether a task reads it, and the nouns for messages."""

    option: str
    reads: Callable[[ControlInputs], bool]
    noun: str
    tasks: str


_CONTROL_INPUTS = (
    _ControlInput("control_path (--cn)", lambda control: control.video, "a control video", "a fun-control task"),
    _ControlInput("reference_image", lambda control: control.reference, "a reference image", "a fun-control task"),
    *(
        _ControlInput(name, lambda control: control.vace, "a VACE context", "a vace task")
        for name in ("vace_video", "vace_mask", "vace_reference", "vace_pad")
    ),
    *(
        _ControlInput(name, lambda control: control.camera, "a camera path", "a fun-camera task")
        for name in ("camera_path", "camera_direction", "camera_origin")
    ),
)


def check_options(given: ControlOptions) -> None:
    """Raise InputError for control options that conflict, regardless of the task."""
    if given.control_start >= given.control_end:
        raise InputError(
            f"--control_start {given.control_start:g} must be less than --control_end {given.control_end:g}"
        )
    if given.control_strength != 1 and not given.control_path:
        raise InputError(
            "--control_strength requires --control_path (--cn): give both, or leave out --control_strength"
        )
    for name in ("vace_mask", "vace_pad"):
        if getattr(given, name) and not given.vace_video:
            raise InputError(f"--{name} requires --vace_video: give both, or leave out --{name}")
    _check_camera(given)


def _check_camera(given: ControlOptions) -> None:
    beside = {"--camera_speed": given.camera_speed != CAMERA_SPEED, "--camera_origin": given.camera_origin}
    if given.camera_path and (flag := first_given({"--camera_direction": given.camera_direction, **beside})):
        raise InputError(f"{flag} and --camera_path both set the camera motion: give one of them")
    if not (given.camera_path or given.camera_direction) and (flag := first_given(beside)):
        raise InputError(f"{flag} requires --camera_direction: give both, or leave out {flag}")
    if given.camera_direction:
        try:
            camera_path(given.camera_direction, 1, given.camera_speed, given.camera_origin or None)  # type: ignore[arg-type]
        except ValueError as problem:
            raise InputError(f"--camera_direction {given.camera_direction}: {problem}") from None


def check_inputs(given: ControlOptions, variant: Variant) -> None:
    """Raise InputError for a control that the task does not take, for a missing one, and for an unreadable image."""
    control = variant.control or ControlInputs()
    for taken in _CONTROL_INPUTS:
        if getattr(given, taken.option.partition(" ")[0]) and not taken.reads(control):
            raise InputError(
                f"--{taken.option}: --task {variant.name} does not take {taken.noun}: use {taken.tasks}, or leave it"
                " out"
            )
    if given.vace_scale != 1 and not control.vace:
        raise InputError(f"--vace_scale: --task {variant.name} is not a vace task: use one, or leave it out")
    if (given.control_start, given.control_end) != (0, 1) and not (control.video or control.vace):
        raise InputError(
            f"--control_start and --control_end: --task {variant.name} does not take a control video: use a"
            " fun-control or vace task, or leave them out"
        )
    if given.motion_bucket_id is not None and (variant.control or variant.images or variant.experts):
        raise InputError(
            f"--motion_bucket_id: --task {variant.name} has no motion controller: use a Wan2.1 t2v task, or leave"
            " it out"
        )
    if control.camera and not (given.camera_direction or given.camera_path):
        raise InputError(f"--task {variant.name} requires a camera path: give --camera_direction or --camera_path")
    if control.video and not given.control_path:
        log.warning("--task %s without --control_path (--cn): the video is not controlled", variant.name)
    for flag, paths in (("--reference_image", [given.reference_image]), ("--vace_reference", given.vace_reference)):
        for path in filter(None, paths):
            check_image(flag, path)


def fit_frames(given: ControlOptions, variant: Variant, *, size: Size, frames: int) -> int:
    """Return the number of frames, 4k+1: `frames`, or fewer if a control is shorter. `size` is (width, height).

    Logs what is shortened, scaled or cropped. Raises InputError for an unreadable video or camera file, and for a
    `vace_pad` that covers the whole video.
    """
    if given.control_path:
        length = _length("--control_path", given.control_path, variant, size)
        frames = _shortened(frames, given.control_path, length)
    if given.vace_video:
        length, longest = _length("--vace_video", given.vace_video, variant, inner_size(given, size)), given.vace_video
        if given.vace_mask and not is_still(given.vace_mask):  # a longer mask extends the video
            length, longest = len(frame_indices("--vace_mask", given.vace_mask, variant.fps)), given.vace_mask
        elif given.vace_mask:
            check_image("--vace_mask", given.vace_mask)
        frames = _shortened(frames, longest, length)
    if given.camera_path:
        frames = _shortened(frames, given.camera_path, len(read_camera(given.camera_path)))
    return frames


def inner_size(given: ControlOptions, size: Size) -> Size:
    """Return the (width, height) inside `vace_pad`. Raises InputError if nothing is left."""
    left, top, right, bottom = sides_of(given)
    width, height = size[0] - left - right, size[1] - top - bottom
    if min(width, height) < 1:
        raise InputError(
            f"--vace_pad {left},{top},{right},{bottom} covers the whole {size[0]}x{size[1]} video: use smaller values,"
            " or a larger --video_size"
        )
    return width, height


def sides_of(given: ControlOptions) -> tuple[int, int, int, int]:
    """Return `vace_pad` as (left, top, right, bottom) pixels; default: zeros."""
    assert not isinstance(given.vace_pad, str)
    left, top, right, bottom = given.vace_pad or (0, 0, 0, 0)
    return left, top, right, bottom


def read_camera(path: str) -> Tensor:
    """Return the entries (N, 19) of a camera file. Raises InputError, naming the option, if it cannot be read."""
    if not Path(path).is_file():
        raise InputError(f"--camera_path {path}: no such file")
    try:
        return read_camera_file(Path(path))
    except InputError as problem:
        raise InputError(f"--camera_path: {problem}") from None


def _length(flag: str, path: str, variant: Variant, size: Size) -> int:
    """Return the number of frames of a control at the task's frame rate; log it if the size differs."""
    indices = frame_indices(flag, path, variant.fps)
    info = probe(Path(path))
    if (info.width, info.height) != size:
        log.info("%s is %dx%d: scaled and cropped to %dx%d", path, info.width, info.height, *size)
    return len(indices)


def _shortened(frames: int, path: str, available: int) -> int:
    fitting = floor_frames(max(available, 1))
    if fitting >= frames:
        return frames
    log.info("%s has %d frame%s: generating %d", path, available, "" if available == 1 else "s", fitting)
    return fitting
