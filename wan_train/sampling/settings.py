"""Sampling options of the generator.

Each is declared once, as a field here, for the command line, prompt lines, tables, requests and records. The fields of
`StartOptions`, `SampleOptions`, `ControlOptions`, `LengthOptions` and `CacheOptions` are the same in a request; the
others have another name or type there, given by their `Sampled`.
"""

from dataclasses import dataclass

from wan_train.cli import option
from wan_train.models.one_frame import read_one_frame
from wan_train.sampling.control_settings import ControlOptions
from wan_train.sampling.length_settings import LengthOptions
from wan_train.sampling.options import Sampled
from wan_train.sampling.step_cache.settings import CacheOptions
from wan_train.sampling.values import read_layers, read_numbers

SOLVER_NAMES = ("unipc", "dpm++", "vanilla", "euler", "lcm")
CFG_SKIP_MODES = ("none", "early", "late", "middle", "early_late", "alternate")
SLG_MODES = ("original", "uncond")
NOISE_DEVICES = ("cpu", "device", "cuda")
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class PromptSettings:
    """Prompts."""

    strict_prompts: bool = option(
        False,
        "Raise an error for text in a prompt that looks like an option, such as -w 832; default: a warning.",
    )


@dataclass(frozen=True)
class TaskSettings:
    """Options with a default per task: prompts, size and steps."""

    prompt: str = option("", "Text prompt.", traits=Sampled(always=True))
    negative_prompt: str | None = option(
        None,
        "Negative prompt; default: the task's.",
        traits=Sampled(letter="n", task="negative_prompt", always=True),
    )
    video_size: tuple[int, int] | None = option(
        None,
        "Width and height in pixels, also as 1280*720; default: the task's.",
        flags=("--size",),
        minimum=16,
        metavar="WIDTH HEIGHT",
        traits=Sampled(field="size", task="size", always=True, maximum=8192),
    )
    video_length: int | None = option(
        None,
        "Number of frames, of the form 4n+1; default: the task's.",
        flags=("--frame_num",),
        minimum=1,
        traits=Sampled(letter="f", table="frame_count", field="frames", task="frames", always=True, maximum=4096),
    )
    infer_steps: int | None = option(
        None,
        "Number of sampling steps; default: the task's.",
        flags=("--sample_steps",),
        minimum=1,
        maximum=1000,
        traits=Sampled(letter="s", table="sample_steps", field="steps", task="steps", always=True),
    )
    guidance_scale: float | None = option(
        None,
        "Classifier-free guidance scale; 1 disables guidance; default: the task's.",
        flags=("--sample_guide_scale",),
        minimum=0,
        traits=Sampled(letter="l", table="cfg_scale", field="guidance", task="guidance", always=True, maximum=1000),
    )
    guidance_scale_high_noise: float | None = option(
        None,
        "Guidance scale of the high-noise expert; default: the task's.",
        minimum=0,
        traits=Sampled(field="guidance_high_noise", maximum=1000),
    )
    flow_shift: float | None = option(
        None,
        "Shift of the flow-matching sigma schedule; default: the task's, for some by resolution.",
        flags=("--sample_shift",),
        minimum=1e-3,
        traits=Sampled(
            letter="fs", table="discrete_flow_shift", field="shift", recorded="noise_shift", always=True, maximum=1000
        ),
    )
    sample_solver: str = option(
        "unipc",
        "Sampling solver; lcm adds new noise at each step, for distilled models.",
        choices=SOLVER_NAMES,
        traits=Sampled(field="solver", always=True),
    )
    timesteps: str | None = option(
        None,
        "Explicit timesteps, such as 1000,750,500,250 for a model distilled to four steps, in place of "
        "--infer_steps; --flow_shift is applied to them.",
        metavar="N,N,...",
        traits=Sampled(read=read_numbers, example="1000,750,500,250"),
    )


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """Noise and first-frame or last-frame images."""

    seed: int | None = option(
        None,
        "Random seed of the noise; default: random, and logged.",
        flags=("--base_seed",),
        minimum=0,
        maximum=MAX_SEED,
        traits=Sampled(letter="d", always=True),
    )
    rand_device: str = option(
        "cpu",
        "Device that draws the noise: cpu is the same on every machine, device (cuda) matches the official code.",
        choices=NOISE_DEVICES,
        shortcuts={"--cpu_noise": "cpu"},
        traits=Sampled(always=True),
    )
    image_path: str | None = option(
        None,
        "First-frame image, for image-to-video tasks.",
        flags=("--image",),
        traits=Sampled(letter="i", is_file=True),
    )
    end_image_path: str | None = option(
        None,
        "Last-frame image, for flf2v tasks, and experimentally for i2v tasks (Fun-InP models are trained for it).",
        traits=Sampled(letter="ei", is_file=True),
    )


@dataclass(frozen=True)
class OneFrameSettings:
    """One-frame inference."""

    one_frame_inference: str | None = option(
        None,
        "Generate one image as a latent frame next to control images: their temporal positions, as in "
        "control_index=0,target_index=1.",
        metavar="control_index=N;N,target_index=N",
        traits=Sampled(letter="of", table="one_frame", field="one_frame", read=read_one_frame),
    )
    control_image_path: tuple[str, ...] = option(
        (),
        "Control images of --one_frame_inference, one per control index.",
        traits=Sampled(letter="ci", field="control_images", is_file=True),
    )


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Options that are the same in a request and on the command line; add new ones at the end."""

    exact_size: bool = option(
        False,
        "Use --video_size exactly and crop the image to it; default: keep the image's aspect ratio at the "
        "area of --video_size.",
        traits=Sampled(recorded="is_fitted"),
    )
    video_path: str | None = option(
        None,
        "Video-to-video: a video, image or folder of images to start from instead of pure noise.",
        traits=Sampled(is_file=True, not_in_previews="not supported in previews: use wan_generate_video.py"),
    )
    denoising_strength: float | None = option(
        None,
        "Strength of video-to-video, from 0.001 (keep --video_path) to 1 (ignore it); default: 0.7.",
        minimum=0.001,
        maximum=1,
        traits=Sampled(beside="video_path"),
    )
    cfg_skip_mode: str = option(
        "none",
        "Which steps run without guidance, for speed; needs --cfg_apply_ratio.",
        choices=CFG_SKIP_MODES,
        traits=Sampled(beside="cfg_apply_ratio"),
    )
    cfg_apply_ratio: float | None = option(
        None, "Ratio of steps with guidance; needs --cfg_skip_mode.", minimum=0, maximum=1
    )
    cfg_merge: bool = option(
        False, "Run the prompt and the negative prompt as one batch: faster for small videos, more memory."
    )
    slg_layers: str | tuple[int, ...] | None = option(
        None,
        "Skip-layer guidance: indices of the blocks to skip, such as 9 or 9,10.",
        metavar="N,N,...",
        traits=Sampled(read=read_layers, example="9 or 9,10"),
    )
    slg_mode: str | None = option(
        None,
        "original adds a third pass to guide away from, uncond skips the blocks in the negative pass; default"
        " with --slg_layers: original.",
        choices=SLG_MODES,
        traits=Sampled(beside="slg_layers"),
    )
    slg_scale: float = option(
        3.0,
        "Scale of skip-layer guidance in mode original.",
        minimum=0,
        traits=Sampled(beside="slg_layers", maximum=1000),
    )
    slg_start: float = option(
        0.0,
        "Ratio of steps at which skip-layer guidance starts.",
        minimum=0,
        maximum=1,
        traits=Sampled(beside="slg_layers"),
    )
    slg_end: float = option(
        0.3,
        "Ratio of steps at which skip-layer guidance ends.",
        minimum=0,
        maximum=1,
        traits=Sampled(beside="slg_layers"),
    )


# The fields of a dataclass begin with those of its last base.
@dataclass(frozen=True)
class SamplingSettings(
    CacheOptions, LengthOptions, ControlOptions, SampleOptions, OneFrameSettings, StartOptions, TaskSettings
):
    """Sampling."""
