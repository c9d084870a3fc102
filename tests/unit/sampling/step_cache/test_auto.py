"""Measured errors, the plan that is made of them, and the file that keeps them."""

import itertools
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.killing import killed_at
from tests.unit.sampling.step_cache.tiny import (
    CPU,
    GUIDANCE,
    NEGATIVE,
    POSITIVE,
    STEPS,
    ByHand,
    request,
    sample,
    tiny_dit,
    watched,
)
from wan_train import storage
from wan_train.errors import InputError
from wan_train.flow.solvers import make_solver
from wan_train.models.dit.dit import Dit, Embedded
from wan_train.models.dit.experts import HIGH, LOW, Pair
from wan_train.models.variants import VARIANTS
from wan_train.sampling.denoise import Sampling
from wan_train.sampling.request import SampleRequest
from wan_train.sampling.step_cache.measure import Measurement, joined
from wan_train.sampling.step_cache.planning import LONGEST, WIDEST, Plan, cheapest
from wan_train.sampling.step_cache.profile import (
    Entry,
    Profile,
    ReuseError,
    check_cache,
    entry_for,
    ratios_for,
    read_profile,
    run_settings,
    write_profile,
)


@pytest.fixture(scope="module")
def dit() -> Dit:
    return tiny_dit()


def measured(model: Dit, wanted: SampleRequest) -> Entry:
    measurement = Measurement()
    sampling = Sampling(wanted, POSITIVE, NEGATIVE, measurement=measurement, device=CPU)
    sampling.advance(model, quiet=True)
    assert torch.equal(sampling.latents, sample(model, replace(wanted, step_cache="none", cache_profile=None)))
    return measurement.entry(run_settings(wanted), {"dit": "1"}, sampling.latents)


def test_errors_and_ratios_are_those_of_a_run_in_full(dit: Dit) -> None:
    """By hand: what step 7 would have been with the residuals of steps 5, and of 5 and 3 on a line."""
    residuals: dict[tuple[int, str], Tensor] = {}
    differences: dict[tuple[int, str], Tensor] = {}
    sigmas = make_solver("euler", steps=STEPS, shift=3.0).sigmas.tolist()

    def blocks(step: int, prompt: str, state: Embedded) -> bool:
        before = state.tokens
        dit.run_blocks(state)
        residuals[step, prompt] = state.tokens - before
        if step == 7:
            true, near, far = dit.finish(state), residuals[5, prompt], residuals[3, prompt]
            slope = (near - far) / (sigmas[5] - sigmas[3])
            for gap, guess in ((0, near), (2, near + slope * (sigmas[7] - sigmas[5]))):
                differences[gap, prompt] = dit.finish(replace(state, tokens=before + guess)) - true
        return True

    latents = ByHand(dit, blocks).run(request()).latents
    entry = measured(dit, request())
    errors = {(row.step, row.age, row.gap): row.error for row in entry.errors}
    for gap in (0, 2):
        positive, negative = differences[gap, "positive"], differences[gap, "negative"]
        guided = negative + GUIDANCE * (positive - negative)
        by_hand = (sigmas[7] - sigmas[8]) * float(guided.norm() / latents.norm())
        assert errors[7, 2, gap] == pytest.approx(by_hand, rel=1e-4)
    norms = [residuals[step, "negative"].norm(dim=-1) for step in (6, 7)]
    assert entry.ratios["negative"][7] == pytest.approx(float((norms[1] / norms[0]).mean()), rel=1e-5)
    assert entry.num_passes == [2] * STEPS
    assert {(age, gap) for step, age, gap in errors if step == STEPS - 1} == {
        (age, gap) for age in range(1, LONGEST + 1) for gap in range(WIDEST + 1)
    }


def brute_force(entry: Entry, budget: float, firsts: list[int]) -> tuple[int, float]:
    """The passes saved and the error of the best of all sets of reused steps."""
    errors, total = {(row.step, row.age, row.gap): row.error for row in entry.errors}, len(entry.num_passes)
    free = [step for step in range(1, total - 1) if step not in firsts]
    best = (0, 0.0)
    for chosen in itertools.chain.from_iterable(itertools.combinations(free, n) for n in range(len(free) + 1)):
        error, computed = 0.0, []
        for step in range(total):
            if step in firsts:
                computed = []
            if step in chosen:
                ways = [errors.get((step, step - computed[-1], 0), 9.0)]
                if len(computed) > 1:
                    ways.append(errors.get((step, step - computed[-1], computed[-1] - computed[-2]), 9.0))
                error += min(ways)
            else:
                computed.append(step)
        saved = sum(entry.num_passes[step] for step in chosen)
        if error <= budget and (saved, -error) > (best[0], -best[1]):
            best = saved, error
    return best


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_is_the_best_of_all(seed: int) -> None:
    chance, total = random.Random(seed), 10
    rows = [
        ReuseError(step, age, gap, chance.random() * age)
        for step in range(1, total)
        for age in range(1, min(step, LONGEST) + 1)
        for gap in range(min(step - age, WIDEST) + 1)
    ]
    entry = Entry({}, {}, [chance.choice((1, 2)) for _ in range(total)], rows, {})
    for budget in (0.1, 0.6, 2.0):
        for firsts in ([0], [0, 4]):
            plan = cheapest(entry, budget, firsts)
            assert (plan.num_saved, pytest.approx(plan.error)) == brute_force(entry, budget, firsts)
            assert plan.num_saved == sum(entry.num_passes[step] for step in plan.reused)
            halved = cheapest(replace(entry, scale=2.0), 2 * budget, firsts)
            assert halved.reused == plan.reused
    assert cheapest(entry, 0.0, [0]) == Plan({}, 0.0, 0)


def profiled(path: Path, model: Dit, **changes: Any) -> SampleRequest:
    wanted = request(step_cache="auto", cache_profile=str(path), **changes)
    write_profile(path, Profile((measured(model, wanted),)))
    return wanted


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"solver": "unipc"},
        {"cfg_merge": True},
        {"cfg_skip_mode": "late", "cfg_apply_ratio": 0.5},
        {"slg_layers": (1,), "slg_start": 0.2, "slg_end": 0.7},
        {"sliding_window_size": 1, "sliding_window_stride": 1},
        {"timesteps": (1000.0, 750.0, 500.0, 250.0), "steps": 4, "guidance": 1.0},
    ],
)
def test_a_run_keeps_its_budget_and_reuses_more_with_a_larger_one(
    changes: dict[str, Any], tmp_path: Path, dit: Dit
) -> None:
    wanted = profiled(tmp_path / "profile.json", dit, **changes)
    full, computed = sample(dit, request(**changes)), []
    for budget in (0.0, 0.02, 0.3):
        with watched(dit) as passes:
            latents = sample(dit, replace(wanted, error_budget=budget))
        computed.append(passes.count(True))
        assert float((latents - full).norm() / full.norm()) <= 1.5 * budget
    assert computed[0] == len(passes) and computed[2] < computed[0]
    assert computed == sorted(computed, reverse=True)


def test_both_experts_are_planned_together(tmp_path: Path) -> None:
    path, models = tmp_path / "profile.json", Pair(tiny_dit(), tiny_dit(1))
    plain = request(variant=VARIANTS["t2v-A14B"], boundary=0.8)
    wanted = replace(plain, step_cache="auto", cache_profile=str(path), error_budget=0.2)

    def run(one: SampleRequest, measurement: Measurement | None = None) -> tuple[Tensor, dict[str, int]]:
        sampling = Sampling(one, POSITIVE, NEGATIVE, measurement=measurement, device=CPU)
        computed = {}
        for expert, model in models.items():
            with watched(model) as passes:
                sampling.advance(model, expert, quiet=True)
            computed[expert] = passes.count(True)
            assert passes[0] and passes[1]
        return sampling.latents, computed

    measurement = Measurement()
    full, num_full = run(wanted, measurement)
    entry = measurement.entry(run_settings(wanted), {}, full)
    switch = num_full[HIGH] // 2
    assert not [row for row in entry.errors if row.step >= switch > row.step - row.age]
    write_profile(path, Profile((entry,)))
    cached, num_cached = run(wanted)
    assert num_cached[HIGH] < num_full[HIGH] and num_cached[LOW] < num_full[LOW]
    assert float((cached - full).norm() / full.norm()) <= 0.3
    assert torch.equal(run(replace(wanted, error_budget=0.0))[0], run(plain)[0])


def test_several_videos_make_one_entry(dit: Dit) -> None:
    entries = [measured(dit, request(seed=seed)) for seed in (1, 2)]
    both = joined(entries)
    assert both.num_videos == 2
    pairs = zip(*(entry.errors for entry in entries), strict=True)
    assert [row.error for row in both.errors] == [max(one.error, two.error) for one, two in pairs]
    assert both.ratios["positive"][5] == pytest.approx(sum(entry.ratios["positive"][5] for entry in entries) / 2)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A profile of one entry, for the request of `tiny`."""
    ratios = {"positive": {step: 1 + step / 100 for step in range(1, STEPS)}}
    entry = Entry(run_settings(request()), {"dit": "1"}, [2] * STEPS, [ReuseError(3, 1, 0, 0.01)], ratios)
    write_profile(tmp_path / "profile.json", Profile((entry,)))
    return tmp_path / "profile.json"


def test_a_profile_reads_as_it_was_written(profile: Path) -> None:
    (entry,) = read_profile(profile).entries
    assert entry.errors == (ReuseError(3, 1, 0, 0.01),)
    assert entry.ratios["positive"][4] == 1.04
    assert read_profile(profile).with_entry(entry).entries == (entry,)
    other = replace(entry, settings=run_settings(request(steps=20)))
    both = read_profile(profile).with_entry(other)
    assert both.nearest(request()) == entry and both.nearest(request(steps=20)) == other


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": 10}, r"another --infer_steps \(12 in the profile, 10 in this run"),
        ({"solver": "unipc"}, r"another --sample_solver \(euler in the profile, unipc in this run"),
        ({"shift": 5.0}, r"another --flow_shift \(3 in the profile, 5 in this run"),
        ({"guidance": 6.0}, r"another --guidance_scale \(3 in the profile, 6 in this run"),
        ({"width": 128, "height": 64}, "about 4 tokens in the profile, about 64 tokens in this run"),
        ({"variant": VARIANTS["t2v-1.3B"]}, r"another --task \(t2v-14B in the profile, t2v-1.3B in this run"),
        ({"slg_layers": (1,)}, r"another --slg_layers \(not set in the profile"),
        (
            {"sliding_window_size": 4, "sliding_window_stride": 2},
            r"another --sliding_window_size \(not set in the profile, 4 every 2",
        ),
    ],
)
def test_a_profile_of_another_run_is_refused_with_the_difference(
    change: dict[str, Any], told: str, profile: Path
) -> None:
    entry_for(str(profile), request())
    with pytest.raises(InputError, match=told) as raised:
        entry_for(str(profile), request(**change))
    assert "--calibrate_steps N --cache_profile FILE" in str(raised.value)


def _newer(text: str) -> str:
    return json.dumps(json.loads(text) | {"version": 2, "entries": "of a kind that nobody knows yet"})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: text[: len(text) // 2], "is not a profile"),
        (lambda text: "", "is not a profile"),
        (lambda text: "[1, 2]", "is not a profile"),
        (lambda text: text.replace('"errors"', '"error"'), "is not a profile"),
        (lambda text: text.replace("step cache profile", "something else"), "is not a profile"),
        (_newer, "has format version 2, the newest supported is 1"),
    ],
)
def test_a_damaged_or_newer_profile_is_an_error_in_one_line(
    damage: Callable[[str], str], told: str, profile: Path
) -> None:
    profile.write_text(damage(profile.read_text()))
    with pytest.raises(InputError, match=told):
        read_profile(profile)


def test_other_weights_are_a_warning(profile: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = request(step_cache="auto", cache_profile=str(profile))
    check_cache(wanted, models={"dit": "1"})
    assert not caplog.records
    check_cache(wanted, models={"dit": "2"})
    assert "measured with a different --dit" in caplog.text


def test_ratios_of_another_number_of_steps_are_those_of_the_nearest(profile: Path) -> None:
    ratios = ratios_for(str(profile), request(steps=23))["positive"]
    assert ratios[22] == 1.11 and ratios[2] == 1.01 and ratios[10] == 1.05


def test_a_writer_that_is_killed_leaves_the_profile_whole(profile: Path) -> None:
    old = profile.read_text()
    (entry,) = read_profile(profile).entries
    new = Profile((entry, replace(entry, settings=run_settings(request(steps=20)))))
    changes, ended, moment = [(os, "replace"), (storage, "flush"), (Path, "write_text")], False, 0
    while not ended:
        profile.write_text(old)
        ended = killed_at(moment, changes, lambda: write_profile(profile, new))
        assert len(read_profile(profile).entries) in (1, 2)
        moment += 1
    assert moment > 2 and len(read_profile(profile).entries) == 2
