"""Run jobs stage by stage: encode prompts, encode inputs, sample, decode; each stage loads its own model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from generate.jobs import Job
from generate.models import Models, VideoInputs
from generate.output import (
    Product,
    latent_metadata,
    latent_path,
    pending_path,
    save_latents,
    stem_of,
    trimmed,
    write_outputs,
    writes_latents,
)
from generate.parallel import report_failures
from generate.record import make_record
from generate.remote_output import deliver
from generate.settings import GenerateSettings, OutputSettings
from generate.source import read_source
from wan_train.distributed.exchange import made_by_first
from wan_train.log import get_logger
from wan_train.models.dit.experts import experts_of
from wan_train.models.variants import VARIANTS
from wan_train.profiling.profiler import Profiler
from wan_train.remote.mirror import Mirror
from wan_train.sampling.denoise import Sampling
from wan_train.sampling.step_cache.schedule import Count
from wan_train.storage import read_tensors

log = get_logger(__name__)


class Delivery(Protocol):
    """The destination of latents and frames."""

    wants_frames: bool

    def put_latents(self, job: Job, latents: Tensor, count: Count | None) -> None:
        """Store sampled latents, with the pass count of a step cache."""

    def take_latents(self, job: Job) -> Tensor:
        """Return the latents that `put_latents` stored."""

    def finish(self, job: Job, latents: Tensor, frames: Iterable[np.ndarray] | None) -> None:
        """Store the result: frames (H, W, 3) uint8, decoded lazily."""

    def report_undecoded(self) -> None:
        """Log stored latents that will not be decoded, and forget them."""


def run_jobs(jobs: Sequence[Job], models: Models, delivery: Delivery) -> None:
    """Run all jobs. A failed job is logged and the others continue; RunError at the end reports it.

    The exception of a single job propagates, and so does that of a job that several processes generate together,
    because the others would wait for the one that fails.
    """
    try:
        _make(jobs, models, delivery)
    finally:
        delivery.report_undecoded()


def _make(jobs: Sequence[Job], models: Models, delivery: Delivery) -> None:
    groups = models.groups
    failures = Failures(alone=groups.num_in_video > 1 or len(jobs) == groups.num_groups == 1)
    profiler = Profiler(models.settings.profile.profile if groups.place.rank == 0 else None, "sampling")
    conditions = models.encode([text for job in jobs for text in (job.request.prompt, job.request.negative_prompt)])
    inputs = encode_inputs(jobs, models, failures)
    samplings: dict[int, Sampling] = {}
    for job in failures.others(jobs):
        with failures.of(job):
            samplings[job.index] = models.start(job.request, conditions, inputs.pop(job.index, VideoInputs()))
    # One model after the other, each for all jobs: only one is loaded at a time, and each is read once.
    for expert in [e for e in experts_of(jobs[0].request.variant) if any(e in s.experts() for s in samplings.values())]:
        with models.dit(expert) as dit:
            for job in failures.others(jobs):
                with failures.of(job), profiler:
                    log.info("%s", describe(job))
                    quiet = groups.place.rank != 0
                    samplings[job.index].advance(dit.model, expert, quiet=quiet, on_step=profiler.step)
                    if not samplings[job.index].experts():
                        done = samplings.pop(job.index)
                        delivery.put_latents(job, done.latents, done.count)
    if delivery.wants_frames:
        with models.vae() as vae:
            for job in failures.others(jobs):
                with failures.of(job):
                    latents = delivery.take_latents(job)
                    delivery.finish(job, latents, models.decode(vae, latents))
    else:
        for job in failures.others(jobs):
            with failures.of(job):
                delivery.finish(job, delivery.take_latents(job), None)
    report_failures(failures.reasons, len(jobs), groups)


def encode_inputs(jobs: Sequence[Job], models: Models, failures: "Failures") -> dict[int, VideoInputs]:
    """Return the encoded inputs of the jobs, on all processes that generate them."""
    if models.settings.parallel.vae_parallel:  # all of them encode together
        return _encode_inputs(jobs, models, failures)
    return made_by_first(models.groups.whole, lambda: _encode_inputs(jobs, models, failures))


def _encode_inputs(jobs: Sequence[Job], models: Models, failures: "Failures") -> dict[int, VideoInputs]:
    """Encode the inputs of the jobs with one model after the other."""
    seen: dict[int, Tensor] = {}
    if imaged := [job for job in jobs if job.request.clip_paths]:
        with models.image_encoder() as encoder:
            for job in imaged:
                with failures.of(job):
                    seen[job.index] = models.encode_clip(encoder, job.request)
    inputs: dict[int, VideoInputs] = {}
    left = failures.others(jobs)
    encoded = [job for job in left if job.request.video_path or job.request.is_from_pixels]
    with models.vae() if encoded else nullcontext() as vae:
        for job in left:
            with failures.of(job):
                source = None
                if vae is not None and job.request.video_path:
                    source = models.encode_video(vae, read_source(job.request, job.request.variant.fps))
                images = models.encode_images(vae, job.request, seen.get(job.index))
                inputs[job.index] = VideoInputs(source, images)
    return inputs


def describe(job: Job) -> str:
    """Return the label and settings of a job in one line."""
    return f"{job.label}: {job.request.settings_summary}"


@dataclass
class Failures:
    """Failed jobs with the reasons; with `alone` exceptions propagate."""

    alone: bool
    reasons: dict[int, str] = field(default_factory=dict)

    @contextmanager
    def of(self, job: Job) -> Iterator[None]:
        """Record an exception inside the context as a failure of this job."""
        try:
            yield
        except Exception as problem:
            if self.alone:
                raise
            self.reasons[job.index] = str(problem).strip().partition("\n")[0] or type(problem).__name__
            log.warning("%s failed, continuing with the others: %s", job.label, self.reasons[job.index])

    def others(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs that have not failed."""
        return [job for job in jobs if job.index not in self.reasons]


class OnDisk:
    """Delivery to files: latents after sampling, and the files of `--output_type` after decoding."""

    def __init__(
        self, settings: GenerateSettings, hashes: Mapping[str, object], *, several: bool, mirror: Mirror | None = None
    ) -> None:
        self.settings, self.hashes, self.several, self.mirror = settings, hashes, several, mirror
        self.wants_frames = settings.output.output_type != "latent"
        self._stems: dict[int, Path] = {}
        self._counts: dict[int, Count | None] = {}

    def put_latents(self, job: Job, latents: Tensor, count: Count | None) -> None:
        self._counts[job.index] = count
        self._stems[job.index] = stem_of(self.settings.output, job, several=self.several)
        save_latents(self._kept(job.index), latents, self._comment(job), latent_metadata(job.request))

    def take_latents(self, job: Job) -> Tensor:
        return dict(read_tensors(self._kept(job.index)))["latent"].clone()

    def finish(self, job: Job, latents: Tensor, frames: Iterable[np.ndarray] | None) -> None:
        output = self.settings.output
        fps = output.fps or VARIANTS[self.settings.dit.task].fps
        stem, metadata = self._stems[job.index], latent_metadata(job.request)
        kept = None if frames is None else trimmed(frames, output)
        product = Product(latents, kept, fps, stem, self._comment(job), metadata, output)
        for path in write_outputs(product):
            deliver(path, self.mirror)
        if not writes_latents(output):
            self._kept(job.index).unlink()
        del self._stems[job.index]

    def report_undecoded(self) -> None:
        left = [path for path in map(self._kept, self._stems) if path.is_file()]
        if left:
            log.warning("sampled but not decoded: %s; decode with --latent_path", ", ".join(map(str, left)))
        self._stems.clear()

    def _kept(self, index: int) -> Path:
        """Return the path of the latents: the final one if they are an output, else a temporary one."""
        stem = self._stems[index]
        return latent_path(stem) if writes_latents(self.settings.output) else pending_path(stem)

    def _comment(self, job: Job) -> str:
        if self.settings.output.no_metadata:
            return ""
        return make_record(self.settings, job.request, self.hashes).text(self._counts[job.index])


class InMemory:
    """Delivery in memory: `frames` (F, H, W, 3) uint8 by job, trimmed."""

    wants_frames = True

    def __init__(self, output: OutputSettings) -> None:
        self._output = output
        self.frames: dict[int, np.ndarray] = {}
        self._latents: dict[int, Tensor] = {}

    def put_latents(self, job: Job, latents: Tensor, count: Count | None) -> None:
        self._latents[job.index] = latents

    def take_latents(self, job: Job) -> Tensor:
        return self._latents.pop(job.index)

    def finish(self, job: Job, latents: Tensor, frames: Iterable[np.ndarray] | None) -> None:
        assert frames is not None
        self.frames[job.index] = np.stack(list(trimmed(frames, self._output)))

    def report_undecoded(self) -> None:
        self._latents.clear()
