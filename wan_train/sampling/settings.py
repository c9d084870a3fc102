"""Settings of sampling that the generator takes from its command line."""

from dataclasses import dataclass

from wan_train.cli import option

SOLVER_NAMES = ("unipc", "dpm++", "vanilla", "euler")
CFG_SKIP_MODES = ("none", "early", "late", "middle", "early_late", "alternate")


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling."""

    prompt: str = option("", "What the video shows.", required=True)
    negative_prompt: str | None = option(None, "What it must not show; without it the task's own text.")
    video_size: tuple[int, int] | None = option(
        None, "Width and height in pixels; without it the task's.", minimum=16, metavar="WIDTH HEIGHT"
    )
    video_length: int | None = option(None, "Frames, 4n+1; without it the task's.", minimum=1)
    infer_steps: int | None = option(None, "Sampling steps; without it the task's.", minimum=1, maximum=1000)
    guidance_scale: float | None = option(
        None, "Classifier-free guidance; 1 does without the negative prompt; without it the task's.", minimum=0
    )
    flow_shift: float | None = option(None, "Shift of the noise levels; without it the task's.", minimum=1e-3)
    sample_solver: str = option("unipc", "Solver of the sampling ODE.", choices=SOLVER_NAMES)
    seed: int | None = option(None, "Seed of the noise; without it one is drawn and printed.", minimum=0)
    cfg_skip_mode: str = option(
        "none", "Which steps go without guidance, for speed; needs --cfg_apply_ratio.", choices=CFG_SKIP_MODES
    )
    cfg_apply_ratio: float | None = option(
        None, "Share of the steps that are guided; needs --cfg_skip_mode.", minimum=0, maximum=1
    )
