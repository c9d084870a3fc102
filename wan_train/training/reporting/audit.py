"""Compare the noise levels that each expert is trained on with those used in generation: `--audit_timesteps`."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_train.errors import InputError
from wan_train.flow.solvers import make_solver
from wan_train.flow.timesteps import NUM_TIMESTEPS
from wan_train.models.dit.experts import expert_at, read_boundary, span_of
from wan_train.models.variants import VARIANTS, Variant
from wan_train.sampling.settings import SOLVER_NAMES
from wan_train.training.experts.plan import ExpertPlan, plan_experts
from wan_train.training.objective.loss import draw_levels, span
from wan_train.training.settings import TimestepSettings, TrainSettings

NUM_DRAWS = 1_000_000
PIXELS = (480, 832)


@dataclass(frozen=True)
class Share:
    """The noise levels that an expert is trained on: its share of all draws, their range of t, and the share of its
    draws beyond the boundary."""

    expert: str | None
    part: float
    low: float
    high: float
    outside: float


def audit(settings: TrainSettings, num_draws: int = NUM_DRAWS) -> str:
    """Return the text to print. Levels are drawn with the run's own sampler, with --seed or 0."""
    plan, variant = plan_experts(settings), VARIANTS[settings.dit.task]
    lines = [f"{num_draws:,} draws of t, {settings.timesteps.timestep_sampling}"]
    boundary = read_boundary(settings.experts.timestep_boundary, variant) if variant.experts else None
    size = (PIXELS[0] // variant.space.stride, PIXELS[1] // variant.space.stride)
    for share in measure(
        plan, settings.timesteps, num_draws, seed=settings.loop.seed or 0, boundary=boundary, size=size
    ):
        name = (share.expert or "the model").replace("_", " ")
        line = f"trained, {name}: {share.part:.1%} of the draws, t from {share.low:.4f} to {share.high:.4f}"
        lines.append(line if share.expert is None else f"{line}, {share.outside:.1%} beyond the boundary")
    lines += [f"visited, {line}" for line in visited(variant, boundary)]
    return "\n".join(lines)


def measure(
    plan: ExpertPlan,
    settings: TimestepSettings,
    num_draws: int,
    *,
    seed: int,
    boundary: float | None,
    size: tuple[int, int] = (60, 104),
) -> list[Share]:
    """Measure the noise levels of each expert by drawing; `size` is the latents' (height, width)."""
    chance = random.Random(f"{seed} audited timesteps")
    trained: list[str | None] = [*plan.trained] or [None]
    shares = []
    for expert in trained:
        count = num_draws // len(trained)
        t = draw_levels([chance.random() for _ in range(count)], size, settings, plan.limits(expert, settings))
        outside = 0.0 if expert is None or boundary is None else _share_outside(t, expert, boundary)
        shares.append(Share(expert, count / num_draws, float(t.min()), float(t.max()), outside))
    return shares


def _share_outside(t: Tensor, expert: str, boundary: float) -> float:
    low, high = span_of(expert, boundary)
    outside = (t < torch.tensor(low) - 1e-6) | (t > torch.tensor(high) + 1e-6)
    return float(outside.float().mean())


def visited(variant: Variant, boundary: float | None) -> list[str]:
    """Return the values of t that each solver visits with the task's default steps and shift, by expert."""
    lines = []
    for name in dict.fromkeys(name for name in SOLVER_NAMES if name != "vanilla"):
        solver = make_solver(name, steps=variant.steps, shift=variant.shift)
        parts: dict[str | None, list[float]] = {}
        for timestep in solver.timesteps.tolist():
            expert = None if boundary is None else expert_at(timestep, boundary)
            parts.setdefault(expert, []).append(timestep / NUM_TIMESTEPS)
        told = "; ".join(
            f"{expert.replace('_', ' ') + ' ' if expert else ''}{len(levels)} steps from {levels[0]:.3f} to"
            f" {levels[-1]:.3f}"
            for expert, levels in parts.items()
        )
        lines.append(f"{name}, {variant.steps} steps, shift {variant.shift:g}: {told}")
    return lines


def refuse_unused(plan: ExpertPlan, settings: TimestepSettings) -> None:
    """Raise InputError for an expert that would only be trained at noise levels where generation uses the other."""
    for expert in plan.trained:
        trained, own = plan.limits(expert, settings) or span(settings), span_of(expert, plan.boundary)
        if trained.high <= own[0] or trained.low >= own[1]:
            raise InputError(
                f"the {expert.replace('_', '-')} expert would be trained from {NUM_TIMESTEPS * trained.low:g} to"
                f" {NUM_TIMESTEPS * trained.high:g}, but generation uses it from {NUM_TIMESTEPS * own[0]:g} to"
                f" {NUM_TIMESTEPS * own[1]:g}: change --min_timestep and --max_timestep, or --timestep_boundary, or"
                " use --allow_unused_timesteps"
            )
