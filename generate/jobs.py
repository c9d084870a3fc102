"""Turn the command line, a prompt file or keyboard input into the videos to generate."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

from generate.settings import GenerateSettings
from wan_train.errors import InputError
from wan_train.models.dit.experts import read_boundary
from wan_train.models.variants import VARIANTS, Variant
from wan_train.sampling.grammar import GENERATOR, Grammar, check_text, parse_line, read_prompts
from wan_train.sampling.options import recorded_values, requested_values
from wan_train.sampling.request import SampleRequest, checked, fitted
from wan_train.sampling.settings import SamplingSettings


@dataclass(frozen=True)
class Job:
    """One video to generate: its request, with a seed, and its index in the run, from 0."""

    request: SampleRequest
    index: int

    @property
    def label(self) -> str:
        """Index, prompt and seed of the video, for messages."""
        return f'video {self.index} ("{self.request.short_prompt}", seed {self.request.seed})'


def make_jobs(settings: GenerateSettings) -> list[Job]:
    """Return the jobs of `--prompt` or `--from_file`. Raises InputError for invalid options or lines of the file."""
    defaults = _defaults(settings)
    _check_texts(settings)
    if settings.batch.from_file:
        requests = read_prompts(settings.batch.from_file, defaults, _grammar(settings))
    elif settings.sampling.prompt.strip():
        if settings.sampling.denoising_strength is not None and not settings.sampling.video_path:
            raise InputError("--denoising_strength requires --video_path: give both, or leave out --denoising_strength")
        requests = [fitted(checked(defaults))]
    else:
        raise InputError("--prompt is missing: give a text prompt, or --from_file")
    return numbered(requests)


def parse_job(line: str, settings: GenerateSettings, index: int) -> Job:
    """Return the job of a prompt line, with the command line's options as defaults."""
    defaults = _defaults(settings)
    return Job(with_seed(parse_line(line, defaults, _grammar(settings))), index)


def check_request(settings: GenerateSettings) -> None:
    """Raise InputError for options that are invalid whatever a prompt line says."""
    _check_texts(settings)
    checked(_defaults(settings))


def numbered(requests: Iterable[SampleRequest]) -> list[Job]:
    """Return a job per request, in order; missing seeds are drawn at random."""
    return [Job(with_seed(request), index) for index, request in enumerate(requests)]


def with_seed(request: SampleRequest) -> SampleRequest:
    """Return the request with a seed, drawn at random if it has none."""
    return replace(request, seed=random.SystemRandom().randrange(2**32)) if request.seed is None else request


def _check_texts(settings: GenerateSettings) -> None:
    """Check the prompts of the command line for text that looks like an option; see `check_text`."""
    for flag in ("prompt", "negative_prompt"):
        check_text(getattr(settings.sampling, flag) or "", _grammar(settings), f"--{flag}")


def _grammar(settings: GenerateSettings) -> Grammar:
    return replace(GENERATOR, settings=type(settings.sampling), strict=settings.batch.strict_prompts)


def _defaults(settings: GenerateSettings) -> SampleRequest:
    variant, boundary = VARIANTS[settings.dit.task], settings.experts.timestep_boundary
    request = default_request(settings.sampling, variant)
    return request if boundary is None else replace(request, boundary=read_boundary(boundary, variant))


def default_request(sampling: SamplingSettings, variant: Variant) -> SampleRequest:
    """Return the request of the command line, with the task's defaults; its seed may be None."""
    if sampling.slg_mode and not sampling.slg_layers:
        raise InputError(f"--slg_mode {sampling.slg_mode} requires --slg_layers: give the blocks to skip, such as 9")
    values = requested_values(sampling, variant)
    num_levels = len(values.get("timesteps", ()))
    if num_levels and sampling.infer_steps not in (None, num_levels):
        raise InputError(
            f"--timesteps lists {num_levels} steps, --infer_steps is {sampling.infer_steps}: leave out --infer_steps"
        )
    width, height = values.pop("size")
    steps = num_levels or values["steps"]
    return SampleRequest(**values | {"width": width, "height": height, "steps": steps, "variant": variant})


def request_options(request: SampleRequest, settings: type = SamplingSettings) -> dict[str, object]:
    """Return the options of `settings` that fully specify a request: the inverse of `default_request`."""
    return recorded_values(request, settings)
