"""Make the step cache of a request for the steps of one model."""

from collections.abc import Callable, Mapping

from torch import Tensor

from wan_train.models.dit.dit import Dit
from wan_train.models.dit.experts import expert_at
from wan_train.sampling.passes import PassName
from wan_train.sampling.request import SampleRequest
from wan_train.sampling.step_cache.measure import written_name
from wan_train.sampling.step_cache.planning import cheapest
from wan_train.sampling.step_cache.profile import entry_for, ratios_for
from wan_train.sampling.step_cache.residuals import AttentionOutputs, Residuals, StepCache
from wan_train.sampling.step_cache.schedule import (
    TEACACHE_COEFFICIENTS,
    AttentionCache,
    MagCache,
    Phase,
    Schedule,
    TeaCache,
    follow,
    relative_changes,
)
from wan_train.sampling.step_cache.settings import (
    ATTENTION,
    AUTO,
    MAGCACHE,
    TEACACHE,
    attention_range,
    teacache_model,
)


def make_schedule(request: SampleRequest, model: Dit, phase: Phase, timesteps: Tensor) -> Schedule:
    """Return the reuse schedule of a request's cache in a phase; `timesteps` (N,) are those of the whole request.

    It is computed before the first step. Raises InputError for a profile that does not match.
    """
    return _SCHEDULES[request.step_cache](request, model, phase, timesteps)


def make_cache(request: SampleRequest, schedule: Schedule, sigmas: Tensor) -> StepCache:
    """Return the cache that applies a schedule; `sigmas` (N+1,) are the noise levels of the request."""
    return AttentionOutputs(schedule) if request.step_cache == ATTENTION else Residuals(schedule, sigmas)


def _teacache(request: SampleRequest, model: Dit, phase: Phase, timesteps: Tensor) -> Schedule:
    name = request.tea_cache_model_id or teacache_model(request.variant, *request.size)
    device = model.head.modulation.device
    # Given frames always have timestep 0; only the modulation of noisy frames changes.
    modulation = model.embed_time(timesteps[phase.steps].to(device).float())[1]
    changes = relative_changes(phase.steps, modulation)
    coefficients, threshold = TEACACHE_COEFFICIENTS[name], request.tea_cache_l1_thresh
    return follow(phase, lambda _: TeaCache(changes, coefficients, threshold))


def _magcache(request: SampleRequest, model: Dit, phase: Phase, timesteps: Tensor) -> Schedule:
    assert request.cache_profile is not None
    ratios = ratios_for(request.cache_profile, request)
    retained = phase.steps[: int(len(phase.steps) * request.magcache_retention)]

    def make_rule(name: PassName) -> MagCache:
        known = ratios.get(written_name(name), {})
        return MagCache(known, retained, request.magcache_thresh, request.magcache_k)

    return follow(phase, make_rule)


def _attention(request: SampleRequest, model: Dit, phase: Phase, timesteps: Tensor) -> Schedule:
    start, end = attention_range(request, request.steps)
    return follow(phase, lambda _: AttentionCache(start, end, request.attentioncache_interval))


def _auto(request: SampleRequest, model: Dit, phase: Phase, timesteps: Tensor) -> Schedule:
    assert request.cache_profile is not None
    plan = cheapest(entry_for(request.cache_profile, request), request.error_budget, first_steps(request, timesteps))
    return Schedule(
        {
            name: {step: plan.reused[step] for step in steps if step in plan.reused}
            for name, steps in phase.passes.items()
        }
    )


def first_steps(request: SampleRequest, timesteps: Tensor) -> list[int]:
    """Return the indices of the steps at which a model takes over."""
    if request.variant.experts is None:
        return [0]
    experts = [expert_at(float(timestep), request.expert_boundary) for timestep in timesteps]
    return [index for index, expert in enumerate(experts) if index == 0 or expert != experts[index - 1]]


_SCHEDULES: Mapping[str, Callable[[SampleRequest, Dit, Phase, Tensor], Schedule]] = {
    TEACACHE: _teacache,
    MAGCACHE: _magcache,
    ATTENTION: _attention,
    AUTO: _auto,
}
