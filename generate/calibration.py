"""`--calibrate_steps`: measure the errors of reuse, verify them on the same videos, and write the profile."""

import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from generate.jobs import Job, make_jobs
from generate.models import Models, VideoInputs
from generate.record import weight_hashes
from generate.runs import Failures, describe, encode_inputs
from generate.settings import GenerateSettings
from wan_train.conditions.conditions import Conditions
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.dit.experts import experts_of
from wan_train.sampling.denoise import Sampling
from wan_train.sampling.step_cache.caches import first_steps
from wan_train.sampling.step_cache.measure import Measurement, joined
from wan_train.sampling.step_cache.planning import cheapest
from wan_train.sampling.step_cache.profile import Entry, Profile, read_profile, run_settings, write_profile
from wan_train.sampling.step_cache.settings import AUTO, PROFILED
from wan_train.storage import check_writable

log = get_logger(__name__)

ROUNDS = 3  # of verifying a plan on the videos, and choosing another if it exceeds the budget
# One video in twenty is several times as sensitive as the median, and most calibrations do not include one. So errors
# are multiplied by SAFETY, and the calibration videos may use the fraction RESERVED of the budget. Both were chosen on
# the small model, whose held-out videos keep the budget with profiles of 1, 4 and 8 videos (docs/benchmarks.md).
SAFETY, RESERVED = 3.0, 0.5


def calibration_jobs(settings: GenerateSettings) -> list[Job]:
    """Return the videos to calibrate on, with `--calibrate_steps` steps each.

    Raises InputError for options that conflict with calibration, and for a `--cache_profile` that cannot be written or
    is another file.
    """
    steps, sampling = settings.calibration.calibrate_steps, settings.sampling
    if sampling.step_cache not in PROFILED or not sampling.cache_profile:
        raise InputError(
            f"--calibrate_steps {steps} requires --step_cache auto or magcache, and --cache_profile: give both"
        )
    if sampling.infer_steps not in (None, steps):
        raise InputError(f"--calibrate_steps {steps} and --infer_steps {sampling.infer_steps} differ: leave out one")
    jobs = make_jobs(replace(settings, sampling=replace(sampling, infer_steps=steps)))
    for job in jobs:
        if job.request.steps != steps:
            raise InputError(
                f"{job.label} has {job.request.steps} steps and --calibrate_steps is {steps}: leave out --s"
            )
    check_writable(Path(sampling.cache_profile).parent)
    _existing(sampling.cache_profile)
    return jobs


def calibrate(jobs: Sequence[Job], models: Models, path: str) -> None:
    """Measure the errors of the jobs, and write an entry per run configuration to the profile at `path`."""
    videos = _Videos.of(jobs, models)
    hashes, profile = weight_hashes(models.settings), _existing(path)
    for kind in _kinds(jobs):
        entry = replace(joined(videos.measure(kind, hashes)), scale=SAFETY)
        profile = profile.with_entry(_checked(entry, kind, videos))
    write_profile(path, profile)
    log.info("wrote %s", path)


def _existing(path: str) -> Profile:
    return read_profile(path) if Path(path).exists() else Profile()


def _kinds(jobs: Sequence[Job]) -> list[list[Job]]:
    """Group the jobs by the settings that errors depend on."""
    kinds: dict[tuple[tuple[str, str], ...], list[Job]] = defaultdict(list)
    for job in jobs:
        kinds[tuple(run_settings(job.request).items())].append(job)
    return list(kinds.values())


def _checked(entry: Entry, jobs: Sequence[Job], videos: "_Videos") -> Entry:
    """Return the entry, scaled so that its plan keeps the error budget on the jobs themselves."""
    request = jobs[0].request
    firsts = first_steps(request, videos.timesteps(jobs[0]))
    for _ in range(ROUNDS):
        plan = cheapest(entry, request.error_budget, firsts)
        error = videos.error(jobs, entry) if plan.reused else 0.0
        values = plan.num_saved, sum(entry.num_passes), plan.error, error, entry.num_videos
        log.info("auto reuses %d of %d passes: predicted error %.4f, largest measured %.4f (videos: %d)", *values)
        if error <= RESERVED * request.error_budget:
            return entry
        # The error may not decrease in proportion: scale by at least 1.25 each time.
        entry = replace(entry, scale=entry.scale * max(1.25, error / (RESERVED * request.error_budget)))
    log.info("errors scaled by %.2f; the resulting schedule is not verified on the videos", entry.scale)
    return entry


@dataclass
class _Videos:
    """The inputs of the jobs, and their final latents without a cache."""

    models: Models
    conditions: Mapping[str, Conditions]
    inputs: Mapping[int, VideoInputs]
    latents: dict[int, Tensor]

    @classmethod
    def of(cls, jobs: Sequence[Job], models: Models) -> "_Videos":
        """Encode the inputs of the jobs."""
        texts = [text for job in jobs for text in (job.request.prompt, job.request.negative_prompt)]
        return cls(models, models.encode(texts), encode_inputs(jobs, models, Failures(alone=True)), {})

    def measure(self, jobs: Sequence[Job], hashes: Mapping[str, str]) -> list[Entry]:
        """Sample each job without a cache and return its entry."""
        measurements = {job.index: Measurement() for job in jobs}
        made = self._sample(jobs, measurements)
        self.latents |= made
        return [measurements[job.index].entry(run_settings(job.request), hashes, made[job.index]) for job in jobs]

    def error(self, jobs: Sequence[Job], entry: Entry) -> float:
        """Return the largest relative error of the jobs' latents with the plan of the entry."""
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "profile.json")
            write_profile(path, Profile((entry,)))
            changed = [replace(job, request=replace(job.request, step_cache=AUTO, cache_profile=path)) for job in jobs]
            made = self._sample(changed, {})
        return max(float((made[i] - self.latents[i]).norm() / self.latents[i].norm()) for i in made)

    def timesteps(self, job: Job) -> Tensor:
        """Return the timesteps (N,) of a job's steps."""
        return self._start(job, {}).solver.timesteps

    def _start(self, job: Job, measurements: Mapping[int, Measurement]) -> Sampling:
        inputs = self.inputs.get(job.index, VideoInputs())
        return self.models.start(job.request, self.conditions, inputs, measurement=measurements.get(job.index))

    def _sample(self, jobs: Sequence[Job], measurements: Mapping[int, Measurement]) -> dict[int, Tensor]:
        samplings = {job.index: self._start(job, measurements) for job in jobs}
        for expert in experts_of(jobs[0].request.variant):
            with self.models.dit(expert) as dit:
                for job in jobs:
                    log.info("%s", describe(job))
                    samplings[job.index].advance(dit.model, expert)
        return {index: sampling.latents for index, sampling in samplings.items()}
