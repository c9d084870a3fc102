"""Step caches together with everything else that acts on a step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.sampling.step_cache.tiny import CPU, NEGATIVE, POSITIVE, STEPS, request, sample, tiny_dit, watched
from wan_train.assemble import ModelSettings, equip
from wan_train.conditions.kinds import VACE_CONTEXT
from wan_train.errors import InputError
from wan_train.models.dit.dit import Dit, Embedded, RunBlocks, wrap_run_blocks
from wan_train.models.dit.experts import HIGH, LOW, Pair
from wan_train.models.settings import DitSettings
from wan_train.models.variants import VARIANTS
from wan_train.placement.lanes import HostLane
from wan_train.placement.settings import CompileSettings, StreamSettings
from wan_train.sampling.denoise import Sampling, sample_latents
from wan_train.sampling.guidance import Guidance, plan_steps
from wan_train.sampling.passes import NEGATIVE as OTHER
from wan_train.sampling.passes import POSITIVE as PROMPT
from wan_train.sampling.passes import Pass, PassName, run_model
from wan_train.sampling.request import SampleRequest
from wan_train.sampling.step_cache.residuals import Residuals
from wan_train.sampling.step_cache.schedule import CONSTANT, Count, Phase, Schedule, TeaCache, follow

EVERYTHING = 100.0  # a threshold at which all is reused but the first and the last step
GUIDING: dict[str, dict[str, Any]] = {
    "guided": {},
    "unguided": {"guidance": 1.0},
    "merged": {"cfg_merge": True},
    "late": {"cfg_skip_mode": "late", "cfg_apply_ratio": 0.5},
    "alternate": {"cfg_skip_mode": "alternate", "cfg_apply_ratio": 0.5, "cfg_merge": True},
    "layers": {"slg_layers": (1,), "slg_start": 0.2, "slg_end": 0.7},
    "uncond": {"slg_layers": (1,), "slg_mode": "uncond", "slg_start": 0.0, "slg_end": 0.7},
    "distilled": {"timesteps": (1000.0, 750.0, 500.0, 250.0), "steps": 4, "solver": "lcm", "guidance": 1.0},
    "unipc": {"solver": "unipc"},
    "windows": {"sliding_window_size": 1, "sliding_window_stride": 1},
}
# By way of guiding, the passes that are computed if all is reused that may be: for each pass its first step, and what
# runs at the last step of all.
COMPUTED = {
    **{"guided": 4, "unguided": 2, "merged": 2, "late": 3, "alternate": 3, "layers": 5, "uncond": 5, "distilled": 2},
    **{"unipc": 4, "windows": 8},
}


def teacache(threshold: float) -> dict[str, Any]:
    # This set is positive for changes as large as those of random weights.
    return {
        "step_cache": "teacache",
        "tea_cache_l1_thresh": threshold,
        "tea_cache_model_id": "Wan2.1-I2V-14B-720P",
    }


@pytest.fixture(scope="module")
def dit() -> Dit:
    model = tiny_dit()
    model.time_projection[1].weight.mul_(0.02)
    return model


@pytest.mark.parametrize("name", GUIDING)
def test_thresholds_of_zero_leave_a_video_as_it_is_to_the_bit(name: str, dit: Dit) -> None:
    guiding = GUIDING[name]
    plain = sample(dit, request(**guiding))
    assert torch.equal(sample(dit, request(**guiding, **teacache(0.0))), plain)
    interval = {"step_cache": "attention", "start_step": 0, "end_step": 4, "attentioncache_interval": 1}
    assert torch.equal(sample(dit, request(**guiding, **interval)), plain)


@pytest.mark.parametrize("name", GUIDING)
def test_each_pass_has_a_state_of_its_own(name: str, dit: Dit) -> None:
    wanted = request(**GUIDING[name], **teacache(EVERYTHING))
    with watched(dit) as passes:
        latents = sample(dit, wanted)
    assert passes.count(True) == COMPUTED[name]
    assert passes[0] and passes[-1] and not all(passes)
    assert not torch.equal(latents, sample(dit, request(**GUIDING[name])))


def test_one_batch_reuses_what_two_passes_do(dit: Dit) -> None:
    apart, merged = (sample(dit, request(cfg_merge=merge, **teacache(0.6))) for merge in (False, True))
    torch.testing.assert_close(apart, merged, atol=1e-4, rtol=1e-4)


def test_a_pass_ages_at_steps_at_which_it_does_not_run() -> None:
    """The state continues: of every other step each is two changes away from the one before."""
    guidance = Guidance(3.0, "alternate", 0.5)
    phase = Phase(plan_steps(8, guidance), guidance, 8)
    changes = dict.fromkeys(range(1, 8), 0.1)
    schedule = follow(phase, lambda _: TeaCache(changes, (1.0, 0.0), 0.35))
    assert phase.passes == {PassName(PROMPT): list(range(8)), PassName(OTHER): [1, 3, 5, 7]}
    assert list(schedule.reused[PassName(PROMPT)]) == [1, 2, 3, 5, 6]
    assert list(schedule.reused[PassName(OTHER)]) == [3]
    assert schedule.count(phase) == Count(6, 6)
    assert schedule.num_computed_steps(phase) == 5  # 0, 1 for one of its passes, 4, 5 likewise, 7


def equipped(**settings: Any) -> Dit:
    model = tiny_dit()
    model.time_projection[1].weight.mul_(0.02)
    equip(model, ModelSettings(DitSettings(task="t2v-1.3B", dit=""), **settings), HostLane(CPU))
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"stream": StreamSettings(blocks_to_swap=2, block_swap_ring_size=2)},
        {"compile": CompileSettings(compile=True, compile_backend="eager")},
    ],
)
def test_streamed_and_compiled_blocks_give_the_same(settings: dict[str, Any], dit: Dit) -> None:
    wanted = request(**teacache(0.6))
    model = equipped(**settings)
    with watched(model) as passes:
        assert torch.equal(sample(model, wanted), sample(dit, wanted))
    assert 4 < passes.count(True) < 2 * STEPS


def test_the_attention_cache_refuses_compiled_blocks() -> None:
    model = equipped(compile=CompileSettings(compile=True, compile_backend="eager"))
    with pytest.raises(InputError, match=r"--step_cache attention .* --compile"):
        sample(model, request(step_cache="attention"))


def test_a_reused_step_computes_no_hints_of_vace() -> None:
    model = tiny_dit(vace_layers=(0, 2), vace_dim=96)
    model.time_projection[1].weight.mul_(0.02)
    context = torch.randn(1, 96, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    both = (replace(text, extras={VACE_CONTEXT: context}) for text in (POSITIVE, NEGATIVE))
    calls: list[int] = []
    model.vae_hook = model.vace_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    wanted = request(variant=VARIANTS["vace-1.3B"], **teacache(EVERYTHING))
    sample_latents(model, wanted, *both, device=CPU, quiet=True)
    assert len(calls) == 4


@pytest.mark.parametrize("threshold", [0.0, 0.6, EVERYTHING])
def test_a_given_first_frame_has_its_own_timestep(threshold: float) -> None:
    """Of the 5B: modulation for each frame, and a first frame that no step changes."""
    model = tiny_dit(in_dim=48, out_dim=48)
    model.time_projection[1].weight.mul_(0.02)
    first = torch.ones(1, 48, 1, 2, 4)
    both = [
        replace(text, first_frame=first, has_first=torch.ones(1, dtype=torch.bool)) for text in (POSITIVE, NEGATIVE)
    ]
    wanted = request(variant=VARIANTS["ti2v-5B"], width=64, height=32)
    plain = sample_latents(model, wanted, *both, device=CPU, quiet=True)
    with watched(model) as passes:
        cached = sample_latents(model, replace(wanted, **teacache(threshold)), *both, device=CPU, quiet=True)
    assert torch.equal(cached[:, 0], first[0, :, 0])
    assert torch.equal(cached, plain) == (threshold == 0)
    assert {0.0: 24, EVERYTHING: 4}.get(threshold, 14) == pytest.approx(passes.count(True), abs=9 * (threshold == 0.6))


@pytest.mark.parametrize("cache", [teacache(EVERYTHING), {"step_cache": "attention", "start_step": 0, "end_step": 12}])
def test_an_expert_never_reuses_what_the_other_computed(cache: dict[str, Any]) -> None:
    high, low = tiny_dit(), tiny_dit(1)
    wanted = request(variant=VARIANTS["t2v-A14B"], boundary=0.8, **cache)
    sampling = Sampling(wanted, POSITIVE, NEGATIVE, device=CPU)
    number = sum(float(timestep) >= 800 for timestep in sampling.solver.timesteps)
    assert 2 < number < STEPS - 2
    calls: dict[str, list[int]] = {HIGH: [], LOW: []}
    for expert, model in Pair(high, low).items():
        model.time_projection[1].weight.mul_(0.02)
        model.blocks[0].self_attn.q.register_forward_hook(lambda *_, at=calls[expert]: at.append(1))
        sampling.advance(model, expert, quiet=True)
    assert sampling.latents.isfinite().all()
    if cache["step_cache"] == "teacache":
        assert (len(calls[HIGH]), len(calls[LOW])) == (2, 4)  # first step; first and last step
        assert sampling.count is not None
        assert (sampling.count.computed, sampling.count.reused) == (6, 2 * STEPS - 6)
    else:
        computed = {step for step in range(STEPS) if step % 4 == 0} | {number, STEPS - 1}
        assert len(calls[HIGH]) == 2 * len([step for step in computed if step < number])
        assert len(calls[LOW]) >= 2 * len([step for step in computed if step >= number])


def test_the_state_is_dropped_between_videos(dit: Dit) -> None:
    wanted = request(**teacache(0.6))
    first = sample(dit, wanted)
    sample(dit, replace(wanted, seed=4))
    assert torch.equal(sample(dit, wanted), first)


def test_video_to_video_begins_with_a_computed_step(dit: Dit) -> None:
    wanted = request(video_path="a.mp4", denoising_strength=0.5, **teacache(EVERYTHING))
    source = torch.randn(wanted.latent_shape, generator=torch.Generator().manual_seed(0))
    with watched(dit) as passes:
        sample_latents(dit, wanted, POSITIVE, NEGATIVE, device=CPU, source=source, quiet=True)
    assert passes == [step in (0, STEPS - 1) for step in range(STEPS) for _ in range(2)]


def test_each_window_has_a_residual_of_its_own(dit: Dit) -> None:
    """Both windows of a step are reused by what each had; the schedule is that of the pass."""
    cache = Residuals(Schedule({PassName(PROMPT): {1: CONSTANT}}), torch.tensor([1.0, 0.5, 0.0]))
    run, generator = cache.wrap(run_model(dit)), torch.Generator().manual_seed(0)
    latents = [torch.randn(1, 16, 1, 2, 2, generator=generator) for _ in range(2)]
    context, time = dit.embed_context(list(POSITIVE.context), device=CPU), torch.tensor([900.0])

    def at(step: int, window: int) -> Tensor:
        return run(Pass(PassName(PROMPT, window=window), step, latents[window], time, {"context": context}))

    with watched(dit) as passes, cache.around(dit):
        computed = [at(0, window) for window in range(2)]
        reused = [at(1, window) for window in range(2)]
    # The same latents and time: what is reused is what would be recomputed.
    torch.testing.assert_close(reused, computed)
    assert passes == [True, True, False, False] and not torch.allclose(computed[0], computed[1])


class Halving:
    """Stands in for processes that share out the tokens: each half of the channels goes in its own way."""

    def __init__(self) -> None:
        self.passes = 0

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """Scale the tokens before and after the blocks, as what splits and gathers them would act."""
        assert isinstance(model, Dit)

        def shared(run: RunBlocks) -> RunBlocks:
            def run_share(state: Embedded) -> None:
                self.passes += 1
                state.tokens = state.tokens.roll(1, dims=-1)
                run(state)
                state.tokens = state.tokens.roll(-1, dims=-1)

            return run_share

        with wrap_run_blocks(model, shared):
            yield

    def together(self, passes: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Run the passes here, the last first."""
        return [run() for run in reversed(passes)][::-1]


def test_what_shares_tokens_out_acts_at_reused_steps_too(dit: Dit) -> None:
    def shared(wanted: SampleRequest) -> tuple[Tensor, int]:
        sharing = Halving()
        sampling = Sampling(wanted, POSITIVE, NEGATIVE, sharing=sharing, device=CPU)
        sampling.advance(dit, quiet=True)
        return sampling.latents, sharing.passes

    plain, num_plain = shared(request())
    unskipped, num_unskipped = shared(request(**teacache(0.0)))
    cached, num_cached = shared(request(**teacache(EVERYTHING)))
    assert num_plain == num_unskipped == num_cached == 2 * STEPS
    assert torch.equal(plain, unskipped) and not torch.equal(plain, cached)
    assert cached.isfinite().all()


def test_a_profile_that_is_missing_stops_a_run_before_its_first_step(dit: Dit, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read.*--calibrate_steps"), watched(dit) as passes:
        sample(dit, request(step_cache="auto", cache_profile=str(tmp_path / "none.json")))
    assert passes == []
