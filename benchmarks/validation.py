"""Test whether the held-out loss finds the best checkpoint, on a task that overfits and whose true loss is known.

    python benchmarks/validation.py [--seeds 40]

A model that is linear in the noisy latents and piecewise linear in t is trained on few draws of a normal distribution,
by gradient descent on its exact training loss. Its true loss on fresh draws is a formula, so the best checkpoint is
known; the number of draws and the speed differ between seeds, so that it is not always the same one.
`Validator` measures on other draws of the same distribution, using the trainer's own code. `random` is the same at
the same cost with fresh noise and t at each evaluation, with t from its whole range.

Prints JSON. `best`: over the seeds, how many evaluations the chosen checkpoint lies from the truly best one: how often
each distance, and the share of at most one; `constant` is the share of the best fixed evaluation for all seeds.
`variance`: over 200 keys, for the held-out clips of seed 0, the variance of the estimated difference of their loss
between two checkpoints; `single_ratio`
is that of one estimate, at the later.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dataset.batching.batches import CachedDataset, Sample
from dataset.batching.order import Pick, SampleKey
from dataset.config import DatasetConfig
from dataset.items import Clip, Item
from dataset.sources import ClipPlan
from wan_train.models.variants import VARIANTS
from wan_train.training.evaluating.statistics import Losses
from wan_train.training.evaluating.validation import Validator
from wan_train.training.settings import LossSettings, TimestepSettings, ValidationSettings

SHAPE = (16, 1, 2, 2)
WIDTH = 64
NUM_HELD_OUT = 32
NUM_KNOTS = 9
EVALUATIONS, STEPS_BETWEEN = 16, 12
NUM_STRATA, NUM_KEYS = 8, 200
ALONE = cast(
    Accelerator,
    SimpleNamespace(num_processes=1, process_index=0, is_main_process=False, device=torch.device("cpu")),
)


class DrawnClips(CachedDataset):
    """Held-out clips in memory instead of in caches."""

    def __init__(self, latents: Tensor) -> None:
        folder = Path("drawn")
        config = DatasetConfig(folder, 1, is_video=False, directory=folder, cache_directory=folder, batch_size=64)
        items = [Item(config, folder / f"{number}.png", ("",)) for number in range(len(latents))]
        clips = tuple(Clip(item, 0, (0,), (16, 16), (16, 16)) for item in items)
        super().__init__([ClipPlan(config, tuple(items), clips, ())])
        self._latents = latents

    def __getitem__(self, index: int | SampleKey | Pick) -> Sample:
        assert isinstance(index, int)
        return Sample(self.keys[index], self._latents[index], torch.zeros(1, 1))


class LinearFlow(nn.Module):
    """Velocity M(t) x_t, where M(t) interpolates linearly between `knots` (NUM_KNOTS, WIDTH, WIDTH), evenly spaced in
    t."""

    def __init__(self, knots: Tensor) -> None:
        super().__init__()
        self.knots = knots

    def forward(self, noisy: Tensor, timestep: Tensor, context: list[Tensor]) -> Tensor:
        matrices = torch.einsum("B K, K i j -> B i j", hats(timestep / 1000), self.knots)
        return torch.einsum("B i j, B j -> B i", matrices, noisy.flatten(1)).view_as(noisy)


def hats(t: Tensor) -> Tensor:
    """Return the weight of each knot (..., NUM_KNOTS) at t."""
    places = torch.linspace(0, 1, NUM_KNOTS, dtype=t.dtype)
    return (1 - (t[..., None] - places).abs() * (NUM_KNOTS - 1)).clamp(min=0)


def exact_loss(knots: Tensor, moments: Tensor, num_levels: int = 64) -> Tensor:
    """Return the expected loss for data with these second moments (WIDTH, WIDTH), over all noise and uniform t.

    The error is (1 - tM) noise - (1 + (1-t)M) data, where the noise has unit covariance.
    """
    t = (torch.arange(num_levels, dtype=knots.dtype) + 0.5) / num_levels
    matrices = torch.einsum("T K, K i j -> T i j", hats(t), knots)
    one = torch.eye(WIDTH, dtype=knots.dtype)
    of_noise = one - t.view(-1, 1, 1) * matrices
    of_data = one + (1 - t.view(-1, 1, 1)) * matrices
    return (of_noise.square().sum() + (of_data @ moments * of_data).sum()) / (num_levels * WIDTH)


@dataclass(frozen=True)
class Course:
    """One training run: the model's knots and its true loss at each evaluation, and the held-out clips."""

    knots: list[Tensor]
    risks: Tensor
    held_out: Tensor


def train(seed: int) -> Course:
    """Overfit a model to few draws; their number and the speed depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    share, speed = torch.rand(2, generator=generator).tolist()
    num_trained, rate = 28 + int(share * 28), 0.05 + 0.07 * speed
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    spread = 2 / torch.arange(1, WIDTH + 1) ** 0.7
    clips = torch.randn(num_trained + NUM_HELD_OUT, WIDTH, generator=generator) * spread @ turn
    true = turn.T @ torch.diag(spread**2) @ turn
    seen = clips[:num_trained].T @ clips[:num_trained] / num_trained
    knots, kept, risks = torch.zeros(NUM_KNOTS, WIDTH, WIDTH, requires_grad=True), [], []
    optimizer = torch.optim.SGD([knots], lr=rate * WIDTH * NUM_KNOTS)
    for step in range(EVALUATIONS * STEPS_BETWEEN + 1):
        if step % STEPS_BETWEEN == 0:
            kept.append(knots.detach().clone())
            risks.append(exact_loss(kept[-1], true))
        optimizer.zero_grad()
        exact_loss(knots, seen, 16).backward()
        optimizer.step()
    return Course(kept, torch.stack(risks), clips[num_trained:].view(-1, *SHAPE))


def make_validator(clips: Tensor, *, key: int, num_strata: int = NUM_STRATA) -> Validator:
    """Return the trainer's validator on clips in memory."""
    settings = ValidationSettings(validation_seed=key, validation_timesteps=num_strata)
    return Validator(DrawnClips(clips), settings, TimestepSettings(), LossSettings(), variant=VARIANTS["t2v-1.3B"])


def measure_keyed(clips: Tensor, knots: Tensor, key: int) -> Losses:
    """Return the losses of a checkpoint, as the trainer measures them."""
    return make_validator(clips, key=key).measure(LinearFlow(knots), ALONE)


def measure_random(clips: Tensor, knots: Tensor, key: int) -> Losses:
    """Return the same number of losses with fresh noise and t, with t from its whole range; do not repeat the key."""
    repeated = clips.repeat(NUM_STRATA, *[1] * (clips.ndim - 1))
    return make_validator(repeated, key=key, num_strata=1).measure(LinearFlow(knots), ALONE)


def choose_best(course: Course, seed: int) -> int:
    """Return the evaluation that the trainer's history considers best."""
    validator = make_validator(course.held_out, key=seed)
    for number, knots in enumerate(course.knots):
        validator.evaluate(LinearFlow(knots), ALONE, step=number)
    assert validator.history.best_step is not None
    return validator.history.best_step


def choose_random(course: Course, seed: int) -> int:
    """Return the evaluation with the lowest loss if each one uses fresh draws."""
    keys = range(1000 * (seed + 1), 1000 * (seed + 1) + len(course.knots))
    means = [measure_random(course.held_out, knots, key).mean() for knots, key in zip(course.knots, keys, strict=True)]
    return int(np.argmin(means))


def find_best(num_seeds: int) -> dict[str, Any]:
    """Return the distances between the chosen and the truly best evaluation."""
    courses = [train(seed) for seed in range(num_seeds)]
    true = [int(course.risks.argmin()) for course in courses]
    chosen = {
        "keyed": [choose_best(course, seed) for seed, course in enumerate(courses)],
        "random": [choose_random(course, seed) for seed, course in enumerate(courses)],
    }
    chosen["constant"] = [max(true, key=lambda place: sum(abs(place - other) <= 1 for other in true))] * num_seeds
    found: dict[str, Any] = {"true": dict(sorted(Counter(true).items()))}
    for name, places in chosen.items():
        distances = Counter(abs(place - best) for place, best in zip(places, true, strict=True))
        within = (distances[0] + distances[1]) / num_seeds
        found[name] = {"distances": dict(sorted(distances.items())), "within_one": within}
    return found


def compare_variances(num_keys: int = NUM_KEYS) -> list[dict[str, Any]]:
    """Return variances over keys: the best checkpoint against the first, the next and the last."""
    course = train(0)
    best = int(course.risks.argmin())
    pairs = ((0, best), (best, best + 1), (best, EVALUATIONS))
    return [compare_pair(course, *pair, num_keys=num_keys) for pair in pairs]


def compare_pair(course: Course, one: int, other: int, *, num_keys: int) -> dict[str, Any]:
    """Return variances of the estimated difference between two checkpoints, and of one estimate."""
    clips, before, after = course.held_out, course.knots[one], course.knots[other]
    keyed = np.array([[measure_keyed(clips, at, key).mean() for at in (before, after)] for key in range(num_keys)])
    random = np.array(
        [
            [measure_random(clips, at, 2 * key + turn).mean() for turn, at in enumerate((before, after))]
            for key in range(num_keys)
        ]
    )
    kept, drawn = ((pairs[:, 1] - pairs[:, 0]).var(ddof=1) for pairs in (keyed, random))
    return {
        "evaluations": [one, other],
        "keyed": float(f"{kept:.3g}"),
        "random": float(f"{drawn:.3g}"),
        "ratio": round(float(kept / drawn), 4),
        "single_ratio": round(float(keyed[:, 1].var(ddof=1) / random[:, 1].var(ddof=1)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=40)
    print(json.dumps({"best": find_best(parser.parse_args().seeds), "variance": compare_variances()}, indent=2))


if __name__ == "__main__":
    main()
