"""Settings of sampling that the generator takes from its command line.

Each is declared once: command line, prompt line, table, request and record take it from its field. `StartOptions`,
`SampleOptions`, `ControlOptions`, `LengthOptions` and `CacheOptions` are fields of a request too, as they are here; the
others have another name or type there, which their `Sampled` states.
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
        "Refuse a prompt with a part that looks like an option and is read as text, as -w 832 is; by default that is a"
        " warning.",
    )


@dataclass(frozen=True)
class TaskSettings:
    """What a task has defaults for: the prompts, the size and the steps."""

    prompt: str = option("", "What the video shows.", traits=Sampled(always=True))
    negative_prompt: str | None = option(
        None,
        "What it must not show; default: the task's own text.",
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
        "Number of frames, 4n+1; default: the task's.",
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
        "Classifier-free guidance; 1 leaves out the negative prompt; default: the task's.",
        flags=("--sample_guide_scale",),
        minimum=0,
        traits=Sampled(letter="l", table="cfg_scale", field="guidance", task="guidance", always=True, maximum=1000),
    )
    guidance_scale_high_noise: float | None = option(
        None,
        "Guidance of the expert for high noise; default: the task's.",
        minimum=0,
        traits=Sampled(field="guidance_high_noise", maximum=1000),
    )
    flow_shift: float | None = option(
        None,
        "Shift of the noise levels; default: the task's, which for some depends on the size.",
        flags=("--sample_shift",),
        minimum=1e-3,
        traits=Sampled(
            letter="fs", table="discrete_flow_shift", field="shift", recorded="noise_shift", always=True, maximum=1000
        ),
    )
    sample_solver: str = option(
        "unipc",
        "Solver of the sampling ODE; lcm adds new noise at every step, for distilled models.",
        choices=SOLVER_NAMES,
        traits=Sampled(field="solver", always=True),
    )
    timesteps: str | None = option(
        None,
        "Noise levels to visit, as in 1000,750,500,250 for a model distilled to four steps; in place of --infer_steps."
        " --flow_shift shifts them.",
        metavar="N,N,...",
        traits=Sampled(read=read_numbers, example="1000,750,500,250"),
    )


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """What a video starts from: noise and images."""

    seed: int | None = option(
        None,
        "Seed of the noise; without it one is drawn and printed.",
        flags=("--base_seed",),
        minimum=0,
        maximum=MAX_SEED,
        traits=Sampled(letter="d", always=True),
    )
    rand_device: str = option(
        "cpu",
        "Where noise is drawn: cpu gives the same on every machine, device (cuda) what the official code draws there.",
        choices=NOISE_DEVICES,
        shortcuts={"--cpu_noise": "cpu"},
        traits=Sampled(always=True),
    )
    image_path: str | None = option(
        None,
        "The image that the video begins with, of tasks that make it from one.",
        flags=("--image",),
        traits=Sampled(letter="i", is_file=True),
    )
    end_image_path: str | None = option(
        None,
        "The image that it ends with: of flf2v tasks, and as a trial of i2v ones (Fun-InP models are made for it).",
        traits=Sampled(letter="ei", is_file=True),
    )


@dataclass(frozen=True)
class OneFrameSettings:
    """One-frame inference."""

    one_frame_inference: str | None = option(
        None,
        "Make an image as one latent frame beside given ones: where in time they and it are, as in"
        " control_index=0,target_index=1.",
        metavar="control_index=N;N,target_index=N",
        traits=Sampled(letter="of", table="one_frame", field="one_frame", read=read_one_frame),
    )
    control_image_path: tuple[str, ...] = option(
        (),
        "The given images of --one_frame_inference, one for each index.",
        traits=Sampled(letter="ci", field="control_images", is_file=True),
    )


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Options that a request has as the command line has them; a further one is declared at the end of these."""

    exact_size: bool = option(
        False,
        "Take --video_size as it is, and crop the image to it; without it the video has the image's proportions at"
        " the area of --video_size.",
        traits=Sampled(recorded="is_fitted"),
    )
    video_path: str | None = option(
        None,
        "Begin with this video, image or folder of images in place of noise: video to video.",
        traits=Sampled(is_file=True, not_in_previews="previews begin with noise: leave it to the generator"),
    )
    denoising_strength: float | None = option(
        None,
        "How much of --video_path is made anew: 1 all of it, 0.3 a little; 0.7 without it.",
        minimum=0.001,
        maximum=1,
        traits=Sampled(beside="video_path"),
    )
    cfg_skip_mode: str = option(
        "none",
        "Which steps go without guidance, for speed; needs --cfg_apply_ratio.",
        choices=CFG_SKIP_MODES,
        traits=Sampled(beside="cfg_apply_ratio"),
    )
    cfg_apply_ratio: float | None = option(
        None, "Share of the steps that are guided; needs --cfg_skip_mode.", minimum=0, maximum=1
    )
    cfg_merge: bool = option(
        False, "Run the prompt and the negative prompt as one batch: faster for small videos, more memory."
    )
    slg_layers: str | tuple[int, ...] | None = option(
        None,
        "Skip-layer guidance: numbers of the blocks that are left out, as in 9 or 9,10.",
        metavar="N,N,...",
        traits=Sampled(read=read_layers, example="9 or 9,10"),
    )
    slg_mode: str | None = option(
        None,
        "original adds a third pass that guidance leads away from, uncond leaves the blocks out of the negative pass;"
        " original where --slg_layers is given without it.",
        choices=SLG_MODES,
        traits=Sampled(beside="slg_layers"),
    )
    slg_scale: float = option(
        3.0,
        "Strength of skip-layer guidance in mode original.",
        minimum=0,
        traits=Sampled(beside="slg_layers", maximum=1000),
    )
    slg_start: float = option(
        0.0,
        "Share of the steps after which skip-layer guidance begins.",
        minimum=0,
        maximum=1,
        traits=Sampled(beside="slg_layers"),
    )
    slg_end: float = option(
        0.3, "Share of the steps after which it ends.", minimum=0, maximum=1, traits=Sampled(beside="slg_layers")
    )


# The fields of a dataclass begin with those of its last base.
@dataclass(frozen=True)
class SamplingSettings(
    CacheOptions, LengthOptions, ControlOptions, SampleOptions, OneFrameSettings, StartOptions, TaskSettings
):
    """Sampling."""
