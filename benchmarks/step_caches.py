"""Measure step caches on the small built-in model: passes skipped, loss of quality, and time per video.

`python benchmarks/sampling.py --caches` calibrates on captions of the model's training set, then makes videos of
unseen captions: in full, with auto at its default budget, and with teacache and magcache at thresholds that
skip the same share of the passes. The runs of a caption take turns.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.nano.judge import judge
from examples.nano.measure import choose_held_out, open_models
from examples.nano.world import FRAMES, SIZE, Scene, training_scenes
from generate.calibration import calibrate
from generate.jobs import Job
from generate.models import Models, VideoInputs
from wan_train.conditions.conditions import Conditions
from wan_train.models.dit.dit import Dit
from wan_train.sampling.denoise import Sampling
from wan_train.sampling.guidance import plan_steps
from wan_train.sampling.request import SampleRequest
from wan_train.sampling.step_cache.caches import make_schedule
from wan_train.sampling.step_cache.schedule import Count, Phase

STEPS, GUIDANCE, SHIFT = 50, 2.0, 3.0
NANO = Path(__file__).resolve().parents[1] / "examples" / "nano"
IN_A_ROW = STEPS  # magcache's limit: with a smaller one it cannot skip what auto does


@dataclass
class Runs:
    """The videos of one configuration: seconds, latents, and whether each matches its caption."""

    request: SampleRequest
    seconds: list[float] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    count: Count | None = None


def measure_caches(num_captions: int, num_calibrated: int) -> Iterator[dict[str, object]]:
    """Yield a row for the full run and one for each cache."""
    models = open_models(NANO)
    scenes = choose_held_out(num_captions)
    conditions = models.encode([*(scene.caption for scene in scenes), ""])
    with tempfile.TemporaryDirectory() as folder:
        profile = str(Path(folder) / "profile.json")
        known = request("", step_cache="auto", cache_profile=profile)
        calibrate(calibration_jobs(known, num_calibrated), models, profile)
        with models.dit() as dit:
            ways = same_share(dit.model, known)
            for index, scene in enumerate(scenes):
                for runs in ways.values():
                    run(runs, scene, index, models=models, model=dit.model, conditions=conditions)
    decode(ways, scenes, models)
    full = ways["full"]
    for name, runs in ways.items():
        yield {"cache": name} | summary(runs, full)


def request(caption: str, *, seed: int = 0, **options: object) -> SampleRequest:
    """Return a request for a video of the small world."""
    plain = SampleRequest(caption, "", SIZE, SIZE, FRAMES, STEPS, GUIDANCE, SHIFT, seed=seed)
    return replace(plain, **options)  # type: ignore[arg-type]


def calibration_jobs(known: SampleRequest, count: int) -> list[Job]:
    """Return requests for captions of the training set, with separate seeds."""
    scenes = training_scenes()
    chosen = [scenes[index * len(scenes) // count] for index in range(count)]
    return [Job(replace(known, prompt=scene.caption, seed=10_000 + index), index) for index, scene in enumerate(chosen)]


def same_share(model: Dit, auto: SampleRequest) -> dict[str, Runs]:
    """Return the configurations to compare: thresholds by bisection, so that their share of skipped passes is nearest
    to auto's."""
    wanted = num_reused(model, auto)
    tea = replace(auto, step_cache="teacache", cache_profile=None)
    mag = replace(auto, step_cache="magcache", magcache_k=IN_A_ROW)
    ways = {
        "full": replace(auto, step_cache="none", cache_profile=None),
        "auto": auto,
        "teacache": nearest(wanted, model, lambda value: replace(tea, tea_cache_l1_thresh=value)),
        "magcache": nearest(wanted, model, lambda value: replace(mag, magcache_thresh=value)),
    }
    return {name: Runs(way) for name, way in ways.items()}


def nearest(wanted: int, model: Dit, with_threshold: Callable[[float], SampleRequest]) -> SampleRequest:
    """Return the request whose threshold reuses `wanted` passes, or the nearest number."""
    values = np.geomspace(1e-4, 10, 400)
    return min(map(with_threshold, map(float, values)), key=lambda one: abs(num_reused(model, one) - wanted))


def num_reused(model: Dit, one: SampleRequest) -> int:
    """Return the number of passes that a request reuses, according to its schedule."""
    guidance, empty = one.guided(), Conditions((torch.zeros(1, 1),))
    phase = Phase(plan_steps(one.steps, guidance), guidance, one.steps)
    timesteps = Sampling(one, empty, empty, device=torch.device("cpu")).solver.timesteps
    return make_schedule(one, model, phase, timesteps).count(phase).reused


def run(runs: Runs, scene: Scene, index: int, *, models: Models, model: Dit, conditions: dict[str, Conditions]) -> None:
    """Sample one caption and record the time."""
    wanted = replace(runs.request, prompt=scene.caption, seed=index)
    sampling = models.start(wanted, conditions, VideoInputs())
    began = time.perf_counter()
    sampling.advance(model, quiet=True)
    runs.seconds.append(time.perf_counter() - began)
    runs.latents.append(sampling.latents)
    runs.count = sampling.count


def decode(ways: dict[str, Runs], scenes: Sequence[Scene], models: Models) -> None:
    """Judge every video by its frames."""
    with models.vae() as vae:
        for runs in ways.values():
            clips = (models.decode(vae, latents) for latents in runs.latents)
            runs.right = [judge(clip).fits(scene) for clip, scene in zip(clips, scenes, strict=True)]


def summary(runs: Runs, full: Runs) -> dict[str, object]:
    """Return the shares of skipped passes, of videos that match their caption and of those within the budget; errors;
    times relative to the full run."""
    pairs = zip(runs.latents, full.latents, strict=True)
    errors = sorted(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)
    ratios = [ours / theirs for ours, theirs in zip(runs.seconds, full.seconds, strict=True)]
    count = runs.count
    return {
        "skipped": 0.0 if count is None else count.reused / (count.reused + count.computed),
        "accuracy": float(np.mean(runs.right)),
        "median_error": statistics.median(errors),
        "p95_error": errors[math.ceil(0.95 * len(errors)) - 1],
        "largest_error": errors[-1],
        "within_budget": float(np.mean([error <= runs.request.error_budget for error in errors])),
        "time_ratio": statistics.median(ratios),
        "threshold": {
            "teacache": runs.request.tea_cache_l1_thresh,
            "magcache": runs.request.magcache_thresh,
            "auto": runs.request.error_budget,
        }.get(runs.request.step_cache),
    }
