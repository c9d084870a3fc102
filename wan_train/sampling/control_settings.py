"""Settings of sampling for control models: what a video is made from beside its prompt and the images of its frames.

Declared as those of `wan_train.sampling.settings` are.
"""

from dataclasses import dataclass

from wan_train.cli import option
from wan_train.sampling.options import Sampled
from wan_train.sampling.values import read_camera, read_pad

CAMERA_SPEED = 1 / 54  # of DiffSynth-Studio's presets
NUM_MOTION_BUCKETS = 100
# The options that each takes the place of where they are given earlier, in a record or for all lines.
REPLACED = {
    "camera_direction": ("camera_path",),
    "camera_path": ("camera_direction", "camera_speed", "camera_origin"),
}


@dataclass(frozen=True, kw_only=True)
class ControlOptions:
    """Control videos, references, VACE, camera paths and speed, as requests and the command line have them alike."""

    control_path: str | None = option(
        None,
        "Control video of a fun-control task: a video, an image or a folder of frames; it is scaled and cropped to the"
        " video's size, and the video is made no longer than it.",
        traits=Sampled(letter="cn", table="control_video_path", is_file=True),
    )
    control_start: float = option(
        0.0, "Share of the steps after which the control video, or VACE, begins to act.", minimum=0, maximum=1
    )
    control_end: float = option(1.0, "Share of the steps after which it no longer acts.", minimum=0, maximum=1)
    control_strength: float = option(
        1.0,
        "Scale of the control video's latents; 0 is no control. VACE has --vace_scale.",
        minimum=0,
        maximum=10,
        traits=Sampled(beside="control_path"),
    )
    reference_image: str | None = option(
        None,
        "Reference image: what the subject looks like. For fun-control tasks whose model reads one (Wan2.1 V1.1,"
        " Wan2.2); VACE has --vace_reference.",
        traits=Sampled(is_file=True),
    )
    vace_video: str | None = option(
        None,
        "Video that VACE works on: one to follow (depth, pose, outline), or with --vace_mask one to change in part. A"
        " video, an image or a folder of frames.",
        traits=Sampled(is_file=True),
    )
    vace_mask: str | None = option(
        None,
        "What of --vace_video is made anew: white is generated, black is kept. An image holds for all frames; a mask"
        " longer than the video extends it. Default: all of it.",
        traits=Sampled(is_file=True),
    )
    vace_reference: tuple[str, ...] = option(
        (), "Reference images of VACE: subjects that the video shows.", traits=Sampled(is_file=True)
    )
    vace_scale: float = option(
        1.0, "Scale of what VACE adds; with 0 the base model makes the video alone.", minimum=0, maximum=10
    )
    vace_pad: str | tuple[int, ...] | None = option(
        None,
        "Outpainting: pixels that are generated around --vace_video at each side of the finished video, one number for"
        " all four sides or four.",
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        traits=Sampled(read=read_pad),
    )
    camera_direction: str | None = option(
        None,
        "Which way the camera goes, of fun-camera tasks: Left, Right, Up, Down, LeftUp, LeftDown, RightUp, RightDown,"
        " In or Out.",
    )
    camera_speed: float = option(
        CAMERA_SPEED,
        "How far it goes with each frame; default: 1/54.",
        minimum=0,
        maximum=10,
        traits=Sampled(beside="camera_direction"),
    )
    camera_origin: str | tuple[float, ...] | None = option(
        None,
        "Where it starts: 19 numbers as RealEstate10K writes a camera; default: the one that the models were trained"
        " with.",
        metavar="N,N,...",
        traits=Sampled(read=read_camera),
    )
    camera_path: str | None = option(
        None,
        "Camera path in a file in place of --camera_direction: a line of 19 numbers for each frame (RealEstate10K).",
        traits=Sampled(is_file=True),
    )
    motion_bucket_id: int | None = option(
        None,
        "How much moves, from 0 slow to 100 fast, of a model with a motion controller; default: as the model does"
        " without.",
        minimum=0,
        maximum=NUM_MOTION_BUCKETS,
    )
