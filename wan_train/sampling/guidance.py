"""Guidance: which passes of the model make up a step, and how their velocities are put together.

Classifier-free guidance (Ho and Salimans 2022) leads away from the negative prompt; skip-layer guidance, as users know
it from Stable Diffusion 3.5, away from what the model makes of that prompt with some of its blocks left out.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from wan_train.cli import choose
from wan_train.conditions.conditions import Conditions
from wan_train.conditions.kinds import IMAGE_LATENTS, VACE_CONTEXT
from wan_train.errors import InputError
from wan_train.models.dit.dit import Dit, Embedded, RunBlocks, wrap_run_blocks
from wan_train.sampling.passes import ALONE, BOTH, NEGATIVE, POSITIVE, Pass, PassName, Prompts, Sharing, Wrap, run_model


@dataclass(frozen=True)
class Guidance:
    """How steps are guided: v = v_n + scale (v_p - v_n), on the steps that `skip_mode` with `ratio` leaves.

    `merge` takes both prompts in one batch. Of N steps, int(slg_start N) up to int(slg_end N) are guided by layers too,
    with v_s that of the negative prompt without the blocks `slg_layers`: `slg_mode` is original, which adds
    slg_scale (v_p - v_s), or uncond, which takes v_s for v_n.
    """

    scale: float = 5.0
    skip_mode: str = "none"
    ratio: float | None = None
    merge: bool = False
    slg_layers: tuple[int, ...] = ()
    slg_mode: str = "original"
    slg_scale: float = 3.0
    slg_start: float = 0.0
    slg_end: float = 0.3


@dataclass(frozen=True)
class ControlSchedule:
    """On which steps controls act, and how much.

    Of N steps these are int(start N) up to int(end N). On the others the first `num_channels` of `image_latents`, a
    control video's, are zeros, what VideoX-Fun's models take for no control, and VACE, elsewhere scaled by
    `vace_scale`, adds nothing.
    """

    start: float = 0.0
    end: float = 1.0
    num_channels: int = 0
    vace_scale: float = 1.0


ALWAYS = ControlSchedule()


@dataclass(frozen=True)
class StepPlan:
    """What a step consists of: guided at all, with layers skipped, and with controls acting; its `index` of all."""

    guided: bool
    skipping: bool = False
    controlled: bool = True
    index: int = 0


Predict = Callable[[Tensor, Tensor, StepPlan], Tensor]


def plan_steps(steps: int, guidance: Guidance, controls: ControlSchedule = ALWAYS) -> list[StepPlan]:
    """The plan of each of `steps` steps."""
    guided = [guide and guidance.scale != 1 for guide in guided_steps(steps, guidance.skip_mode, guidance.ratio)]
    window = range(int(guidance.slg_start * steps), int(guidance.slg_end * steps))
    skips = bool(guidance.slg_layers)
    controlled = range(int(controls.start * steps), int(controls.end * steps))
    return [
        StepPlan(guide, skips and guide and index in window, index in controlled, index)
        for index, guide in enumerate(guided)
    ]


def guide(
    model: nn.Module,
    positive: Conditions,
    negative: Conditions,
    guidance: Guidance,
    *,
    controls: ControlSchedule = ALWAYS,
    wraps: Sequence[Wrap] = (),
    sharing: Sharing = ALONE,
    device: torch.device,
) -> Predict:
    """The velocity (1, C, F, H, W) of a step of x, which is anywhere; one pass of the model for a step not guided.

    `wraps` act around each pass, the last outermost; `sharing` says which process runs which.
    """
    conditions = cache(partial(_conditions, positive.to(device), negative.to(device)))
    inputs = cache(lambda prompts: _step_inputs(model, conditions(prompts), device))
    inputs_at = cache(lambda prompts, controlled: _with_controls(inputs(prompts), controls, controlled=controlled))
    call = run_model(model)
    for wrap in wraps:
        call = wrap(call)

    def run(x: Tensor, timestep: Tensor, plan: StepPlan, name: PassName) -> Tensor:
        prompts, size = name.prompts, len(name.prompts)
        latents, time = x.to(device).expand(size, *x.shape[1:]), timestep.to(device).expand(size)
        latents, time = conditions(prompts).fuse(latents, time.float())
        with without_blocks(cast(Dit, model), guidance.slg_layers) if name.skips else nullcontext():
            return call(Pass(name, plan.index, latents, time, inputs_at(prompts, plan.controlled)))

    def predict(x: Tensor, timestep: Tensor, plan: StepPlan) -> Tensor:
        runs = [partial(run, x, timestep, plan, name) for name in pass_names(plan, guidance)]
        return combine(sharing.together(runs), plan, guidance)

    return predict


def pass_names(plan: StepPlan, guidance: Guidance) -> list[PassName]:
    """Return the passes that a step consists of, in the order in which they run."""
    if not plan.guided:
        return [PassName(POSITIVE)]
    skipped = PassName(NEGATIVE, skips=True)
    if plan.skipping and guidance.slg_mode == "uncond":
        return [PassName(POSITIVE), skipped]
    names = [PassName(prompts) for prompts in ((BOTH,) if guidance.merge else (POSITIVE, NEGATIVE))]
    return [*names, skipped] if plan.skipping else names


def combine(outs: Sequence[Tensor], plan: StepPlan, guidance: Guidance) -> Tensor:
    """Return the guided velocity (1, C, F, H, W) of a step's passes, in the order of `pass_names`; it is linear."""
    if not plan.guided:
        return outs[0]
    conditioned, unconditioned, *led_from = (part for out in outs for part in out.split(1))
    velocity = unconditioned + guidance.scale * (conditioned - unconditioned)
    for part in led_from:
        velocity = velocity + guidance.slg_scale * (conditioned - part)
    return velocity


def _conditions(positive: Conditions, negative: Conditions, prompts: Prompts) -> Conditions:
    return {POSITIVE: positive, NEGATIVE: negative}.get(prompts) or positive.joined(negative)


def _step_inputs(model: nn.Module, conditions: Conditions, device: torch.device) -> dict[str, Any]:
    """What the model is called with at every step. The texts are embedded here, once: for an image that is a tenth of
    a pass."""
    inputs: dict[str, Any] = dict(conditions.inputs())
    if isinstance(model, Dit):
        inputs["context"] = model.embed_context(inputs["context"], inputs.pop("clip_features", None), device=device)
    return inputs


def _with_controls(inputs: dict[str, Any], controls: ControlSchedule, *, controlled: bool) -> dict[str, Any]:
    """The inputs of a step on which controls act, or do not."""
    if VACE_CONTEXT in inputs:
        inputs = inputs | {"vace_scale": controls.vace_scale if controlled else 0.0}
    if controls.num_channels and not controlled:
        without = inputs[IMAGE_LATENTS].clone()
        without[:, : controls.num_channels] = 0
        inputs = inputs | {IMAGE_LATENTS: without}
    return inputs


@contextmanager
def without_blocks(model: Dit, layers: Collection[int]) -> Iterator[None]:
    """While it lasts, let passes of the model leave out these of its `blocks`. InputError for one that it lacks."""
    num_blocks = len(model.blocks)
    if beyond := [layer for layer in layers if layer >= num_blocks]:
        raise InputError(f"--slg_layers {beyond[0]} does not exist: the model has blocks 0 to {num_blocks - 1}")

    def leaving_out(run: RunBlocks) -> RunBlocks:
        def run_others(state: Embedded) -> None:
            state.skipped |= frozenset(layers)
            run(state)

        return run_others

    with wrap_run_blocks(model, leaving_out):
        yield


def _ends(steps: int, applied: int, *, first: bool) -> list[bool]:
    return [(index < applied) if first else (index >= steps - applied) for index in range(steps)]


def _centre(steps: int, inside: int, *, value: bool) -> list[bool]:
    start = (steps - inside) // 2
    return [value if start <= index < start + inside else not value for index in range(steps)]


def _alternate(steps: int, ratio: float) -> list[bool]:
    # Plain float sums: users' recipes were tuned with their rounding, so the pattern keeps it.
    weight, spent, pattern = 0.0, 0, []
    for _ in range(steps):
        weight += ratio
        pattern.append(weight - spent >= 1)
        spent += pattern[-1]
    return pattern


_PATTERNS: dict[str, Callable[[int, int, float], list[bool]]] = {
    "none": lambda steps, applied, ratio: [True] * steps,
    "early": lambda steps, applied, ratio: _ends(steps, applied, first=False),
    "late": lambda steps, applied, ratio: _ends(steps, applied, first=True),
    "early_late": lambda steps, applied, ratio: _centre(steps, applied, value=True),
    "middle": lambda steps, applied, ratio: _centre(steps, steps - applied, value=False),
    "alternate": lambda steps, applied, ratio: _alternate(steps, ratio),
}


def guided_steps(steps: int, mode: str = "none", ratio: float | None = None) -> list[bool]:
    """For each of `steps` steps, whether it is guided.

    The mode names what is skipped: `early` skips the first steps, `late` the last, `middle` the middle, `early_late`
    both ends; `alternate` spreads the skips. `ratio` in [0, 1] is the share of steps that are guided. Without a ratio,
    or with mode `none`, all are.
    """
    pattern = choose("CFG skip mode", mode, _PATTERNS)
    if mode == "none" or ratio is None:
        return [True] * steps
    if not 0 <= ratio <= 1:
        raise InputError(f"the ratio of guided steps must be between 0 and 1, not {ratio}")
    return pattern(steps, int(steps * ratio), ratio)
