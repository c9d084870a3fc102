"""From the command line, a file or the keyboard to the videos that are wanted."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from generate.settings import GenerateSettings
from wan_train.errors import InputError
from wan_train.models.dit.experts import read_boundary
from wan_train.models.one_frame import OneFrame, read_one_frame
from wan_train.models.variants import VARIANTS, Variant
from wan_train.sampling.grammar import GENERATOR, Grammar, check_text, parse_line, read_prompts
from wan_train.sampling.request import STRENGTH, SampleRequest, checked, fitted, read_layers, read_numbers
from wan_train.sampling.settings import SamplingSettings

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One video to make: its request, with a seed, and its number among all of a run, from 0."""

    request: SampleRequest
    index: int

    @property
    def shown(self) -> str:
        """The video in a few words, for a message."""
        return f'video {self.index} ("{self.request.shown_words}", seed {self.request.seed})'


def make_jobs(settings: GenerateSettings) -> list[Job]:
    """What `--prompt` or `--from_file` wants. InputError for what the options or a line of the file get wrong."""
    defaults = _defaults(settings)
    _check_texts(settings)
    if settings.batch.from_file:
        requests = read_prompts(settings.batch.from_file, defaults, _grammar(settings))
    elif settings.sampling.prompt.strip():
        if settings.sampling.denoising_strength is not None and not settings.sampling.video_path:
            raise InputError("--denoising_strength says how much of --video_path is made anew: give that too")
        requests = [fitted(checked(defaults))]
    else:
        raise InputError("--prompt is missing: say what the video shows, or give --from_file")
    return numbered(requests)


def parse_job(line: str, settings: GenerateSettings, index: int) -> Job:
    """The job of a prompt line over the command line's options."""
    defaults = _defaults(settings)
    return Job(with_seed(parse_line(line, defaults, _grammar(settings))), index)


def check_request(settings: GenerateSettings) -> None:
    """Refuse options that no prompt line could mend."""
    _check_texts(settings)
    checked(_defaults(settings))


def numbered(requests: Iterable[SampleRequest]) -> list[Job]:
    """A job for each request, in order; seeds are drawn where there is none."""
    return [Job(with_seed(request), index) for index, request in enumerate(requests)]


def with_seed(request: SampleRequest) -> SampleRequest:
    """The request with a seed, drawn if it has none."""
    return replace(request, seed=_chosen(request.seed, random.SystemRandom().randrange(2**32)))


def _check_texts(settings: GenerateSettings) -> None:
    """Warn of options inside of the command line's own prompts, or refuse them, as `check_text` does."""
    for flag in ("prompt", "negative_prompt"):
        check_text(getattr(settings.sampling, flag) or "", _grammar(settings), f"--{flag}")


def _grammar(settings: GenerateSettings) -> Grammar:
    return replace(GENERATOR, strict=settings.batch.strict_prompts)


def _defaults(settings: GenerateSettings) -> SampleRequest:
    variant, boundary = VARIANTS[settings.dit.task], settings.experts.timestep_boundary
    request = default_request(settings.sampling, variant)
    return request if boundary is None else replace(request, boundary=read_boundary(boundary, variant))


def default_request(sampling: SamplingSettings, variant: Variant) -> SampleRequest:
    """The request that the command line states, the task's defaults filled in; its seed may be None."""
    if sampling.slg_mode and not sampling.slg_layers:
        raise InputError(f"--slg_mode {sampling.slg_mode} needs --slg_layers: say which blocks to leave out, as in 9")
    timesteps = _read("--timesteps", sampling.timesteps, read_numbers, "1000,750,500,250")
    if timesteps and sampling.infer_steps not in (None, len(timesteps)):
        raise InputError(
            f"--timesteps lists {len(timesteps)} steps and --infer_steps says {sampling.infer_steps}: leave that out"
        )
    width, height = sampling.video_size or variant.size
    return SampleRequest(
        prompt=sampling.prompt,
        negative_prompt=_chosen(sampling.negative_prompt, variant.negative_prompt),
        width=width,
        height=height,
        frames=_chosen(sampling.video_length, variant.frames),
        steps=len(timesteps) or _chosen(sampling.infer_steps, variant.steps),
        guidance=_chosen(sampling.guidance_scale, variant.guidance),
        guidance_high_noise=sampling.guidance_scale_high_noise,
        shift=sampling.flow_shift,
        seed=sampling.seed,
        variant=variant,
        solver=sampling.sample_solver,
        timesteps=timesteps,
        rand_device=sampling.rand_device,
        video_path=sampling.video_path,
        denoising_strength=_chosen(sampling.denoising_strength, STRENGTH),
        image_path=sampling.image_path,
        end_image_path=sampling.end_image_path,
        exact_size=sampling.exact_size,
        one_frame=_read_one_frame(sampling.one_frame_inference),
        control_images=sampling.control_image_path,
        cfg_skip_mode=sampling.cfg_skip_mode,
        cfg_apply_ratio=sampling.cfg_apply_ratio,
        cfg_merge=sampling.cfg_merge,
        slg_layers=_read("--slg_layers", sampling.slg_layers, read_layers, "9 or 9,10"),
        slg_mode=sampling.slg_mode or "original",
        slg_scale=sampling.slg_scale,
        slg_start=sampling.slg_start,
        slg_end=sampling.slg_end,
    )


def request_options(request: SampleRequest) -> dict[str, object]:
    """The generator's options that state this request whatever the defaults are; the inverse of `default_request`."""
    values: dict[str, object] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "video_size": [request.width, request.height],
        "video_length": request.frames,
        "infer_steps": request.steps,
        "guidance_scale": request.guidance,
        "flow_shift": request.noise_shift,
        "seed": request.seed,
        "sample_solver": request.solver,
        "rand_device": request.rand_device,
    }
    if request.guidance_high_noise is not None:
        values["guidance_scale_high_noise"] = request.guidance_high_noise
    if request.timesteps:
        values["timesteps"] = ",".join(map(str, request.timesteps))
    if request.video_path:
        values |= {"video_path": request.video_path, "denoising_strength": request.denoising_strength}
    if request.picture_paths:
        named = {"image_path": request.image_path, "end_image_path": request.end_image_path}
        values |= {name: path for name, path in named.items() if path} | {"exact_size": True}
    if request.one_frame is not None:
        values["one_frame_inference"] = str(request.one_frame)
    if request.control_images:
        values["control_image_path"] = list(request.control_images)
    if request.cfg_apply_ratio is not None:
        values |= {"cfg_skip_mode": request.cfg_skip_mode, "cfg_apply_ratio": request.cfg_apply_ratio}
    if request.cfg_merge:
        values["cfg_merge"] = True
    if request.slg_layers:
        values["slg_layers"] = ",".join(map(str, request.slg_layers))
        values |= {name: getattr(request, name) for name in ("slg_mode", "slg_scale", "slg_start", "slg_end")}
    return values


def _chosen(given: T | None, default: T) -> T:
    return default if given is None else given


def _read_one_frame(text: str | None) -> OneFrame | None:
    try:
        return None if text is None else read_one_frame(text)
    except ValueError as problem:
        raise InputError(f"--one_frame_inference {text!r}: it {problem}") from None


def _read(flag: str, text: str | None, read: Callable[[str], tuple[T, ...]], example: str) -> tuple[T, ...]:
    if text is None:
        return ()
    try:
        values = read(text)
    except ValueError:
        values = ()
    if not values:
        raise InputError(f"{flag} {text!r} is no list of numbers: write {example}")
    return values
