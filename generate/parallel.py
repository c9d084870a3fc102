"""The generator on several processes: checks, the division of videos, and which process writes."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from generate.jobs import Job
from generate.settings import GenerateSettings
from wan_train.distributed.exchange import from_all, made_by_first
from wan_train.distributed.groups import Groups
from wan_train.errors import InputError, RunError
from wan_train.log import get_logger
from wan_train.models.loading import outline_dit
from wan_train.models.variants import VARIANTS
from wan_train.sampling.step_cache.schedule import Count

log = get_logger(__name__)


def check_parallel(settings: GenerateSettings) -> None:
    """Raise InputError for options that do not work with several processes."""
    parallel = settings.parallel
    if parallel.ring_size > 1 and settings.dit.attn_mode not in ("torch", "sdpa"):
        raise InputError(
            f"--ring_size {parallel.ring_size} with --attn_mode {settings.dit.attn_mode}: ring attention needs the"
            " log-sum-exp of each softmax, which only torch's kernels return; use --sdpa, or --ulysses_size"
        )
    if parallel.ulysses_size * parallel.ring_size > 1 and settings.compile.compile_fullgraph:
        raise InputError(
            "--compile_fullgraph compiles each block as one graph, --ulysses_size and --ring_size exchange tokens"
            " inside it: leave out --compile_fullgraph"
        )


def check_heads(settings: GenerateSettings) -> None:
    """Raise InputError if a model's attention heads are not divisible by `--ulysses_size`; only headers are read."""
    parallel, dits = settings.parallel, {"--dit": settings.dit.dit}
    if VARIANTS[settings.dit.task].experts is not None:
        dits["--dit_high_noise"] = settings.experts.dit_high_noise
    for flag, path in dits.items() if parallel.ulysses_size > 1 else ():
        heads = outline_dit(path).config.num_heads
        if heads % parallel.ulysses_size:
            fitting = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
            raise InputError(
                f"--ulysses_size {parallel.ulysses_size}: {flag} {path} has {heads} attention heads: use one of"
                f" {fitting}, and --ring_size or --cfg_size for the other processes"
            )


def refuse_several(groups: Groups, flag: str, reason: str) -> None:
    """Raise InputError for an option that needs a single process."""
    if groups.all.size > 1:
        raise InputError(f"{flag} with {groups.all.size} processes: {reason}; start one process")


def check_shared_jobs(settings: GenerateSettings, jobs: Sequence[Job]) -> None:
    """Raise InputError for videos that cannot be divided among the processes."""
    parallel = settings.parallel
    if parallel.data_parallel > len(jobs):
        raise InputError(
            f"--data_parallel {parallel.data_parallel} is more than the number of videos, {len(jobs)}: give"
            f" more prompts with --from_file, or --data_parallel {len(jobs)}"
        )
    merging = [job for job in jobs if job.request.cfg_merge]
    if parallel.cfg_size > 1 and merging:
        raise InputError(
            "--cfg_merge runs both prompts in one pass, --cfg_size 2 on different processes: give one of them"
            f" ({merging[0].label})"
        )
    if parallel.cfg_size > 1 and (alone := [job for job in jobs if job.request.guidance == 1]):
        log.warning("--cfg_size 2: %s has a guidance scale of 1, so half of the processes are idle", alone[0].label)


def share_of(jobs: Sequence[Job], groups: Groups) -> list[Job]:
    """Return the jobs of this process's group; their indices do not change."""
    return list(jobs[groups.index :: groups.num_groups])


def agree_on(jobs: Sequence[Job], groups: Groups) -> list[Job]:
    """Return the jobs of the first process, which draws the seeds, on all processes."""
    return list(made_by_first(groups.all, lambda: list(jobs)))


def report_failures(reasons: Mapping[int, str], total: int, groups: Groups) -> None:
    """Raise RunError if any job of any group has failed; `total` is the number of jobs of this group."""
    everyone = from_all(groups.all, (dict(reasons), total) if groups.is_first else ({}, 0))
    failed = {index: reason for part, _ in everyone for index, reason in part.items()}
    if failed:
        listed = "; ".join(f"video {index}: {reason}" for index, reason in sorted(failed.items()))
        wanted = sum(count for _, count in everyone)
        raise RunError(f"{len(failed)} of {wanted} videos failed ({listed}); the others are written")


class NoOutput:
    """Delivery of a process that writes nothing; it keeps latents only to decode them with the others."""

    def __init__(self, *, wants_frames: bool) -> None:
        self.wants_frames = wants_frames
        self._latents: dict[int, Tensor] = {}

    def put_latents(self, job: Job, latents: Tensor, count: Count | None) -> None:
        if self.wants_frames:
            self._latents[job.index] = latents

    def take_latents(self, job: Job) -> Tensor:
        return self._latents.pop(job.index) if self.wants_frames else torch.empty(0)

    def finish(self, job: Job, latents: Tensor, frames: Iterable[np.ndarray] | None) -> None:
        deque(frames or (), maxlen=0)  # iterate to decode this process's strips; it receives no frames

    def report_undecoded(self) -> None:
        self._latents.clear()
