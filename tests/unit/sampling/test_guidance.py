"""What each step computes: prompts in one batch or two, and blocks left out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.placement.blocks import CONFIG
from wan_train.assemble import ModelSettings, equip
from wan_train.conditions.conditions import Conditions
from wan_train.errors import InputError
from wan_train.models.dit.dit import Dit, DitConfig, Embedded, RunBlocks, wrap_run_blocks
from wan_train.models.settings import DitSettings
from wan_train.placement.lanes import HostLane
from wan_train.placement.settings import CompileSettings, RecomputeSettings, StreamSettings
from wan_train.sampling import text_kv_cache
from wan_train.sampling.denoise import sample_latents
from wan_train.sampling.guidance import Guidance, StepPlan, guide, plan_steps, without_blocks
from wan_train.sampling.request import SampleRequest

CPU = torch.device("cpu")
POSITIVE, NEGATIVE = Conditions((torch.full((1, 4), 3.0),)), Conditions((torch.full((1, 4), 1.0),))


class Adder(nn.Module):
    """A block that adds its number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, *shared: object) -> Tensor:
        return x + self.value


class Sums(nn.Module):
    """A model whose velocity is its context plus 10 and 100, one from each block; it notes what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Adder(10.0), Adder(100.0)])
        self.batches: list[int] = []

    def forward(self, latents: Tensor, timestep: Tensor, context: list[Tensor]) -> Tensor:
        assert len(latents) == len(timestep) == len(context)
        self.batches.append(len(latents))
        x = torch.stack([rows.mean() for rows in context]).view(-1, 1, 1, 1, 1).expand_as(latents)
        state = Embedded(x, *[torch.empty(0)] * 4, (1, 1, 1))
        self.run_blocks(state)
        return state.tokens

    def run_blocks(self, state: Embedded) -> None:
        Dit.run_blocks(self, state)  # type: ignore[arg-type]


def velocity(guidance: Guidance, plan: StepPlan) -> tuple[float, list[int]]:
    model = Sums()
    predict = guide(model, POSITIVE, NEGATIVE, guidance, device=CPU)
    return float(predict(torch.zeros(1, 2, 1, 2, 2), torch.tensor(500.0), plan).mean()), model.batches


def test_a_step_without_guidance_is_one_pass() -> None:
    assert velocity(Guidance(5.0), StepPlan(guided=False)) == (113.0, [1])


def test_guidance_in_one_batch_is_guidance_in_two() -> None:
    apart, together = (velocity(Guidance(5.0, merge=merge), StepPlan(guided=True)) for merge in (False, True))
    assert apart == (111 + 5 * 2, [1, 1])
    assert together == (111 + 5 * 2, [2])


def test_skip_layer_guidance_leads_away_from_the_negative_prompt_without_the_blocks() -> None:
    guidance = Guidance(5.0, slg_layers=(1,), slg_scale=2.0)
    # v_n + 5 (v_p - v_n) + 2 (v_p - v_s), v_s without the 100 of block 1
    assert velocity(guidance, StepPlan(guided=True, skipping=True)) == (121 + 2 * (113 - 11), [1, 1, 1])
    merged = replace(guidance, merge=True)
    assert velocity(merged, StepPlan(guided=True, skipping=True)) == (121 + 2 * (113 - 11), [2, 1])


def test_the_mode_uncond_takes_it_for_the_negative_pass() -> None:
    guidance = Guidance(5.0, slg_layers=(1,), slg_mode="uncond")
    assert velocity(guidance, StepPlan(guided=True, skipping=True)) == (11 + 5 * (113 - 11), [1, 1])


TINY = replace(CONFIG, in_dim=4, out_dim=4, text_dim=8, freq_dim=8)
STREAM = StreamSettings(blocks_to_swap=2, block_swap_ring_size=2)
COMPILE = CompileSettings(compile=True, compile_backend="eager")


def tiny_dit() -> Dit:
    torch.manual_seed(0)
    model = Dit(TINY).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    return model


def equipped(**settings: Any) -> Dit:
    model = tiny_dit()
    equip(model, ModelSettings(DitSettings(task="t2v-1.3B", dit=""), **settings), HostLane(CPU))
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stream": STREAM},
        {"activations": RecomputeSettings(recompute="full")},
        {"compile": COMPILE},
        {"stream": STREAM, "activations": RecomputeSettings(recompute="full"), "compile": COMPILE},
    ],
)
def test_a_pass_without_blocks_is_that_of_a_model_without_them(settings: dict[str, Any]) -> None:
    inputs = (torch.randn(1, 4, 2, 6, 8), torch.tensor([500.0]), torch.randn(1, 5, 8))
    model = equipped(**settings)
    with torch.no_grad():
        whole = tiny_dit()(*inputs)
        for layers in ((), (1,), (0, 2), (2,), (0, 1, 2)):
            fewer = tiny_dit()
            fewer.blocks = nn.ModuleList(block for index, block in enumerate(fewer.blocks) if index not in layers)
            for _ in range(2):
                with without_blocks(model, layers):
                    assert torch.equal(model(*inputs), fewer(*inputs))
                assert torch.equal(model(*inputs), whole)


def test_all_blocks_take_part_again_after_an_error() -> None:
    model, inputs = tiny_dit(), (torch.randn(1, 4, 1, 2, 2), torch.tensor([1.0]), torch.randn(1, 5, 8))
    whole = model(*inputs)
    with pytest.raises(RuntimeError), without_blocks(model, (0, 1)):
        assert not torch.equal(model(*inputs), whole)
        raise RuntimeError("in between")
    assert torch.equal(model(*inputs), whole)


def test_blocks_are_left_out_of_what_another_wrap_runs() -> None:
    """A step cache, or a pass that ranks share, sees the same blocks left out whichever of the two is entered first."""
    model, inputs = tiny_dit(), (torch.randn(1, 4, 1, 2, 2), torch.tensor([1.0]), torch.randn(1, 5, 8))

    def twice(run: RunBlocks) -> RunBlocks:
        def run_twice(state: Embedded) -> None:
            run(state)
            run(state)

        return run_twice

    with without_blocks(model, (1,)), wrap_run_blocks(model, twice):
        inside = model(*inputs)
    with wrap_run_blocks(model, twice), without_blocks(model, (1,)), without_blocks(model, (1,)):
        outside = model(*inputs)
    model.blocks = nn.ModuleList([model.blocks[0], model.blocks[2]] * 2)
    assert torch.equal(inside, model(*inputs)) and torch.equal(outside, inside)


def test_a_block_that_the_model_lacks_is_told() -> None:
    with pytest.raises(InputError, match="--slg_layers 3 does not exist: the model has blocks 0 to 2"):
        with without_blocks(tiny_dit(), (1, 3)):
            pass


def test_layers_are_skipped_between_start_and_end_where_steps_are_guided() -> None:
    plans = plan_steps(10, Guidance(4.0, slg_layers=(0,), slg_start=0.1, slg_end=0.5))
    assert [plan.skipping for plan in plans] == [False, True, True, True, True, False, False, False, False, False]
    halved = plan_steps(10, Guidance(4.0, "early", 0.7, slg_layers=(0,), slg_start=0.1, slg_end=0.5))
    assert [plan.skipping for plan in halved] == [False, False, False, True, True, False, False, False, False, False]
    assert not any(plan.skipping for plan in plan_steps(10, Guidance(4.0)))
    assert not any(plan.guided for plan in plan_steps(10, Guidance(1.0, slg_layers=(0,))))


@pytest.fixture(scope="module")
def dit() -> Dit:
    torch.manual_seed(0)
    model = Dit(DitConfig(64, 96, 2, 3, text_dim=4)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    return model


def sample(dit: Dit, **changes: object) -> Tensor:
    request = SampleRequest("a", "b", 32, 16, 5, 4, 4.0, 3.0, seed=3)
    return sample_latents(
        dit,
        replace(request, **changes),
        POSITIVE,
        NEGATIVE,
        device=CPU,
        quiet=True,  # type: ignore[arg-type]
    )


def test_every_way_of_guiding_acts_on_a_real_model(dit: Dit) -> None:
    plain = sample(dit)
    torch.testing.assert_close(sample(dit, cfg_merge=True), plain, atol=1e-3, rtol=1e-3)
    others = [
        {"slg_layers": (1,), "slg_end": 1.0},
        {"slg_layers": (1,), "slg_end": 1.0, "slg_mode": "uncond"},
        {"slg_layers": (2,), "slg_end": 1.0},
        {"slg_layers": (1,), "slg_end": 1.0, "slg_scale": 1.0},
        {"slg_layers": (1,), "slg_end": 0.5},
        {"cfg_skip_mode": "late", "cfg_apply_ratio": 0.5},
        {"solver": "lcm"},
        {"timesteps": (1000.0, 700.0, 500.0, 100.0)},
    ]
    results = [plain, *(sample(dit, **changes) for changes in others)]
    for index, result in enumerate(results):
        assert all((result - other).abs().max() > 1e-3 for other in results[:index])
    assert torch.equal(sample(dit, slg_layers=(1,), slg_end=0.1), plain)


@pytest.mark.parametrize("changes", [{}, {"cfg_merge": True}, {"slg_layers": (1,), "slg_end": 1.0}])
def test_texts_are_read_once_for_all_steps(
    dit: Dit, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[int] = []
    parts = (dit.text_embedding, dit.blocks[0].cross_attn.k, dit.blocks[2].cross_attn.v)
    for part in parts:
        part.register_forward_hook(lambda module, inputs, output: texts.append(len(output)))
    made = sample(dit, steps=5, **changes)
    assert sum(texts) == 2 * len(parts)
    with monkeypatch.context() as patch:
        patch.setattr(text_kv_cache, "MOST_TOKENS", 0)
        assert torch.equal(sample(dit, steps=5, **changes), made)
    assert sum(texts) > 4 * len(parts)
    assert all("read" not in vars(block.cross_attn) for block in dit.blocks)


def test_a_source_decides_the_more_the_less_is_made_anew(dit: Dit) -> None:
    source = torch.randn(16, 2, 2, 4, generator=torch.Generator().manual_seed(1))
    request = SampleRequest("a", "b", 32, 16, 5, 6, 1.0, 1.0, seed=3)

    def distance(strength: float) -> float:
        wished = replace(request, denoising_strength=strength)
        made = sample_latents(dit, wished, POSITIVE, NEGATIVE, device=CPU, source=source, quiet=True)
        return float((made - source).norm() / source.norm())

    assert distance(0.01) < 0.1 < distance(0.3) < distance(0.9)
