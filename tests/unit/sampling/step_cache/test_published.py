"""TeaCache, MagCache and the attention cache against their published rules, decided step by step as those do."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.unit.sampling.step_cache.tiny import STEPS, ByHand, request, sample, tiny_dit, watched
from wan_train.models.dit.dit import Dit, Embedded
from wan_train.models.dit.elementwise import gated, modulate
from wan_train.sampling.request import SampleRequest
from wan_train.sampling.step_cache.profile import Entry, Profile, run_settings, write_profile
from wan_train.sampling.step_cache.schedule import TEACACHE_COEFFICIENTS


def check(model: Dit, wanted: SampleRequest, by_hand: ByHand) -> None:
    """The same passes computed, and the same latents to the bit."""
    by_hand.run(wanted)
    with watched(model) as passes:
        latents = sample(model, wanted)
    if wanted.step_cache != "attention":
        assert passes == by_hand.computed
    assert 0.2 < sum(by_hand.computed) / len(by_hand.computed) < 0.9  # some of both
    assert torch.equal(latents, by_hand.latents)
    assert not torch.equal(latents, sample(model, request()))


@pytest.mark.parametrize("name", TEACACHE_COEFFICIENTS)
def test_teacache_skips_and_reuses_what_the_published_rule_does(name: str) -> None:
    model = tiny_dit()
    # A time embedding that changes by some hundredths a step, where the polynomials were fitted.
    model.time_projection[1].weight.mul_(0.02)
    threshold, powers = 0.45, TEACACHE_COEFFICIENTS[name]
    sums, before, residuals = {}, {}, {}

    def blocks(step: int, prompt: str, state: Embedded) -> bool:
        modulation = state.modulation
        if step in (0, STEPS - 1):
            compute, sums[prompt] = True, 0.0
        else:
            previous = before[prompt]
            change = float((modulation - previous).abs().mean() / previous.abs().mean())
            value = 0.0
            for coefficient in powers:
                value = value * change + coefficient
            sums[prompt] += value
            compute = not sums[prompt] < threshold
            if compute:
                sums[prompt] = 0.0
        before[prompt] = modulation.clone()
        return compute_or_reuse(model, state, residuals, prompt, compute=compute)

    check(
        model,
        request(step_cache="teacache", tea_cache_l1_thresh=threshold, tea_cache_model_id=name),
        ByHand(model, blocks),
    )


@pytest.mark.parametrize("longest", [1, 3])
def test_magcache_skips_and_reuses_what_the_published_rule_does(longest: int, tmp_path: Path) -> None:
    model, generator = tiny_dit(), torch.Generator().manual_seed(1)
    ratios: dict[str, list[float]] = {
        prompt: (1 + 0.04 * torch.randn(STEPS, generator=generator)).tolist() for prompt in ("positive", "negative")
    }
    path = tmp_path / "profile.json"
    measured = {prompt: dict(enumerate(rows)) for prompt, rows in ratios.items()}
    write_profile(path, Profile((Entry(run_settings(request()), {}, [2] * STEPS, [], measured),)))
    ratio, error, length = ({"positive": start, "negative": start} for start in (1.0, 0.0, 0))
    residuals: dict[str, Tensor] = {}

    def blocks(step: int, prompt: str, state: Embedded) -> bool:
        skip = False
        if step >= int(STEPS * 0.2):
            ratio[prompt] *= ratios[prompt][step]
            length[prompt] += 1
            error[prompt] += abs(1 - ratio[prompt])
            skip = error[prompt] < 0.1 and length[prompt] <= longest and step != STEPS - 1
            if not skip:
                ratio[prompt], error[prompt], length[prompt] = 1.0, 0.0, 0
        return compute_or_reuse(model, state, residuals, prompt, compute=not skip)

    wanted = request(step_cache="magcache", magcache_thresh=0.1, magcache_k=longest, cache_profile=str(path))
    check(model, wanted, ByHand(model, blocks))


def test_the_attention_cache_reuses_self_attention_in_its_range() -> None:
    model, kept = tiny_dit(), {}

    def blocks(step: int, prompt: str, state: Embedded) -> bool:
        inside = 3 <= step < 9
        compute = not inside or (step - 3) % 3 == 0
        for index, block in enumerate(model.blocks):
            shift, scale, gate, shift2, scale2, gate2 = (block.modulation.float() + state.modulation).unbind(2)
            x = state.tokens
            if compute:
                modulated = modulate(block.norm1(x), shift, scale)
                kept[prompt, index] = block.self_attn(modulated, modulated, state.rope)
            x = gated(x, kept[prompt, index], gate)
            x = x + block.cross_attn(block.norm3(x), state.context)
            state.tokens = gated(x, block.ffn(modulate(block.norm2(x), shift2, scale2)), gate2)
        return compute

    wanted = request(step_cache="attention", start_step=3, end_step=9, attentioncache_interval=3)
    by_hand = ByHand(model, blocks)
    check(model, wanted, by_hand)
    assert by_hand.computed == [step not in (4, 5, 7, 8) for step in range(STEPS) for _ in range(2)]


def compute_or_reuse(model: Dit, state: Embedded, residuals: dict[str, Tensor], prompt: str, *, compute: bool) -> bool:
    before = state.tokens
    if compute:
        model.run_blocks(state)
        residuals[prompt] = state.tokens - before
    else:
        state.tokens = before + residuals[prompt]
    return compute
