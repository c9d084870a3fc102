"""Sampling options for control models: control videos, references, VACE and cameras.

They are declared like those of `wan_train.sampling.settings`.
"""

from dataclasses import dataclass

from wan_train.cli import option
from wan_train.sampling.options import Sampled
from wan_train.sampling.values import read_camera, read_pad

CAMERA_SPEED = 1 / 54  # of DiffSynth-Studio's presets
NUM_MOTION_BUCKETS = 100
# An option -> the options that it replaces, if a record or the command line has set them before.
REPLACED = {
    "camera_direction": ("camera_path",),
    "camera_path": ("camera_direction", "camera_speed", "camera_origin"),
}


@dataclass(frozen=True, kw_only=True)
class ControlOptions:
    """Control videos, references, VACE, cameras and motion; the same fields in a request and on the command line."""

    control_path: str | None = option(
        None,
        "Control video for fun-control tasks: a video, image or folder of frames, scaled and cropped to the "
        "output size; it limits the number of frames.",
        traits=Sampled(letter="cn", table="control_video_path", is_file=True),
    )
    control_start: float = option(
        0.0, "Ratio of steps at which the control video, or VACE, starts to apply.", minimum=0, maximum=1
    )
    control_end: float = option(
        1.0, "Ratio of steps at which the control video, or VACE, stops applying.", minimum=0, maximum=1
    )
    control_strength: float = option(
        1.0,
        "Scale of the control video's latents; 0 disables the control. VACE has --vace_scale.",
        minimum=0,
        maximum=10,
        traits=Sampled(beside="control_path"),
    )
    reference_image: str | None = option(
        None,
        "Reference image of the subject, for fun-control models that take one (Wan2.1 V1.1, Wan2.2); VACE has"
        " --vace_reference.",
        traits=Sampled(is_file=True),
    )
    vace_video: str | None = option(
        None,
        "VACE input video: a control to follow (depth, pose, edges), or with --vace_mask a video to edit. A "
        "video, image or folder of frames.",
        traits=Sampled(is_file=True),
    )
    vace_mask: str | None = option(
        None,
        "Mask of --vace_video: white is generated, black is kept. An image applies to all frames; a mask "
        "longer than the video extends it. Default: generate everything.",
        traits=Sampled(is_file=True),
    )
    vace_reference: tuple[str, ...] = option(
        (), "VACE reference images: subjects to show in the video.", traits=Sampled(is_file=True)
    )
    vace_scale: float = option(1.0, "Scale of VACE's hints; 0 uses the base model alone.", minimum=0, maximum=10)
    vace_pad: str | tuple[int, ...] | None = option(
        None,
        "Outpainting: number of pixels to generate around --vace_video, one value for all sides or four for "
        "left, top, right, bottom.",
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        traits=Sampled(read=read_pad),
    )
    camera_direction: str | None = option(
        None,
        "Camera motion for fun-camera tasks: Left, Right, Up, Down, LeftUp, LeftDown, RightUp, RightDown, In or Out.",
    )
    camera_speed: float = option(
        CAMERA_SPEED,
        "Camera motion per frame; default: 1/54.",
        minimum=0,
        maximum=10,
        traits=Sampled(beside="camera_direction"),
    )
    camera_origin: str | tuple[float, ...] | None = option(
        None,
        "Initial camera, as 19 values in RealEstate10K format; default: the camera that the models were trained with.",
        metavar="N,N,...",
        traits=Sampled(read=read_camera),
    )
    camera_path: str | None = option(
        None,
        "Camera trajectory file in place of --camera_direction: one line of 19 values per frame "
        "(RealEstate10K format).",
        traits=Sampled(is_file=True),
    )
    motion_bucket_id: int | None = option(
        None,
        "Amount of motion, from 0 (slow) to 100 (fast), for models with a motion controller; default: no "
        "motion control.",
        minimum=0,
        maximum=NUM_MOTION_BUCKETS,
    )
