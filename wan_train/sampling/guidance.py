"""Guidance: the passes of a step, and how their velocities are combined.

Classifier-free guidance (Ho and Salimans 2022) guides away from the negative prompt; skip-layer guidance, known from
Stable Diffusion 3.5, away from the output for the negative prompt with some blocks skipped.
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
from wan_train.placement.transfers import send
from wan_train.sampling.passes import ALONE, BOTH, NEGATIVE, POSITIVE, Pass, PassName, Prompts, Sharing, Wrap, run_model


@dataclass(frozen=True)
class Guidance:
    """Guidance settings: v = v_n + scale (v_p - v_n), on the steps that `skip_mode` and `ratio` select.

    `merge` runs both prompts as one batch. Of N steps, int(slg_start N) up to int(slg_end N) use skip-layer guidance,
    where v_s is the velocity of the negative prompt without the blocks `slg_layers`: `slg_mode` original adds
    slg_scale (v_p - v_s), uncond uses v_s in place of v_n.
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
    """The steps at which controls apply, and the scale of VACE.

    Of N steps these are int(start N) up to int(end N). At the others the first `num_channels` channels of
    `image_latents`, those of the control video, are zeros, which VideoX-Fun's models read as no control, and VACE has
    scale 0 instead of `vace_scale`.
    """

    start: float = 0.0
    end: float = 1.0
    num_channels: int = 0
    vace_scale: float = 1.0


ALWAYS = ControlSchedule()


@dataclass(frozen=True)
class StepPlan:
    """Whether a step is guided, uses skip-layer guidance and applies controls; `index` counts all steps from 0."""

    guided: bool
    skipping: bool = False
    controlled: bool = True
    index: int = 0


Predict = Callable[[Tensor, Tensor, StepPlan], Tensor]


def plan_steps(steps: int, guidance: Guidance, controls: ControlSchedule = ALWAYS) -> list[StepPlan]:
    """Return the plan of each step."""
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
    """Return a function from x, on any device, to the guided velocity (1, C, F, H, W) of a step.

    x is copied to the device once for all passes, and no pass waits for the one before it. A step without guidance is
    one pass. `wraps` are applied to each pass, the last outermost; `sharing` divides the passes among processes.
    """
    conditions = cache(partial(_conditions, positive.to(device), negative.to(device)))
    inputs = cache(lambda prompts: _step_inputs(model, conditions(prompts), device))
    inputs_at = cache(lambda prompts, controlled: _with_controls(inputs(prompts), controls, controlled=controlled))
    call = run_model(model)
    for wrap in wraps:
        call = wrap(call)

    def run(x: Tensor, timestep: Tensor, plan: StepPlan, name: PassName) -> Tensor:
        prompts, size = name.prompts, len(name.prompts)
        latents, time = x.expand(size, *x.shape[1:]), timestep.expand(size)
        latents, time = conditions(prompts).fuse(latents, time.float())
        with without_blocks(cast(Dit, model), guidance.slg_layers) if name.skips else nullcontext():
            return call(Pass(name, plan.index, latents, time, inputs_at(prompts, plan.controlled)))

    def predict(x: Tensor, timestep: Tensor, plan: StepPlan) -> Tensor:
        near, time = send(x, device), send(timestep, device)
        runs = [partial(run, near, time, plan, name) for name in pass_names(plan, guidance)]
        return combine(sharing.together(runs), plan, guidance)

    return predict


def pass_names(plan: StepPlan, guidance: Guidance) -> list[PassName]:
    """Return the names of a step's passes, in execution order."""
    if not plan.guided:
        return [PassName(POSITIVE)]
    skipped = PassName(NEGATIVE, skips=True)
    if plan.skipping and guidance.slg_mode == "uncond":
        return [PassName(POSITIVE), skipped]
    names = [PassName(prompts) for prompts in ((BOTH,) if guidance.merge else (POSITIVE, NEGATIVE))]
    return [*names, skipped] if plan.skipping else names


def combine(outs: Sequence[Tensor], plan: StepPlan, guidance: Guidance) -> Tensor:
    """Return the guided velocity (1, C, F, H, W), a linear combination of the passes in the order of `pass_names`."""
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
    """Return the model's inputs that are the same at every step. Texts are embedded here, once: for an image that is
    a tenth of a pass."""
    inputs: dict[str, Any] = dict(conditions.inputs())
    if isinstance(model, Dit):
        inputs["context"] = model.embed_context(inputs["context"], inputs.pop("clip_features", None), device=device)
    return inputs


def _with_controls(inputs: dict[str, Any], controls: ControlSchedule, *, controlled: bool) -> dict[str, Any]:
    """Return the inputs of a step at which controls apply, or do not."""
    if VACE_CONTEXT in inputs:
        inputs = inputs | {"vace_scale": controls.vace_scale if controlled else 0.0}
    if controls.num_channels and not controlled:
        without = inputs[IMAGE_LATENTS].clone()
        without[:, : controls.num_channels] = 0
        inputs = inputs | {IMAGE_LATENTS: without}
    return inputs


@contextmanager
def without_blocks(model: Dit, layers: Collection[int]) -> Iterator[None]:
    """Skip these blocks of the model inside the context. Raises InputError for an index that it does not have."""
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
    # Plain float sums: existing recipes rely on their rounding.
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
    """Return, for each step, whether it is guided.

    `mode` names the steps to skip: `early` the first, `late` the last, `middle` the middle, `early_late` both ends;
    `alternate` spreads them evenly. `ratio` in [0, 1] is the share of guided steps. Without a ratio, or with mode
    `none`, all steps are guided.
    """
    pattern = choose("CFG skip mode", mode, _PATTERNS)
    if mode == "none" or ratio is None:
        return [True] * steps
    if not 0 <= ratio <= 1:
        raise InputError(f"the ratio of guided steps must be between 0 and 1, not {ratio}")
    return pattern(steps, int(steps * ratio), ratio)
