from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wan_train.conditions.conditions import Conditions
from wan_train.errors import InputError
from wan_train.models.variants import VARIANTS
from wan_train.sampling import denoise
from wan_train.sampling.denoise import initial_noise, sample_latents, seeded
from wan_train.sampling.grammar import parse_line
from wan_train.sampling.guidance import guided_steps
from wan_train.sampling.request import preview_defaults
from wan_train.sampling.settings import CFG_SKIP_MODES

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("steps", "ratio", "mode", "pattern"),
    [
        (10, 0.6, "early", "SSSSAAAAAA"),
        (10, 0.6, "late", "AAAAAASSSS"),
        (10, 0.6, "middle", "AAASSSSAAA"),
        (10, 0.6, "early_late", "SSAAAAAASS"),
        (10, 0.6, "alternate", "SASAASASAS"),
        (7, 0.4, "early", "SSSSSAA"),
        (7, 0.4, "middle", "ASSSSSA"),
        (7, 0.4, "early_late", "SSAASSS"),
        (7, 0.4, "alternate", "SSASASS"),
        (5, 0.0, "late", "SSSSS"),
        (5, 1.0, "middle", "AAAAA"),
    ],
)
def test_which_steps_are_guided(steps: int, ratio: float, mode: str, pattern: str) -> None:
    assert "".join("SA"[guided] for guided in guided_steps(steps, mode, ratio)) == pattern


def test_without_a_mode_or_a_ratio_all_steps_are_guided() -> None:
    assert guided_steps(4) == guided_steps(4, "none", 0.5) == guided_steps(4, "early", None) == [True] * 4


def test_unknown_modes_and_ratios_are_refused() -> None:
    for mode, ratio in (("soon", 0.5), ("early", 1.5)):
        with pytest.raises(InputError):
            guided_steps(4, mode, ratio)
    assert all(guided_steps(4, mode, 0.5) for mode in CFG_SKIP_MODES)


class Recorder(nn.Module):
    """A model whose velocity tells the conditions apart, and that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[float] = []

    def forward(self, latents: Tensor, timestep: Tensor, context: list[Tensor]) -> Tensor:
        value = float(context[0].mean())
        self.calls.append(value)
        return torch.full_like(latents, value)


def sample(line: str, **changes: object) -> tuple[Recorder, Tensor, Tensor]:
    request = parse_line(line, preview_defaults(VARIANTS["t2v-1.3B"]))
    request = replace(request, solver="euler", **changes)  # type: ignore[arg-type]
    model = Recorder()
    positive, negative = Conditions((torch.ones(1, 4),)), Conditions((torch.zeros(1, 4),))
    latents = sample_latents(model, request, positive, negative, device=CPU, quiet=True)
    assert request.seed is not None
    return model, latents, initial_noise(request.latent_shape, seeded(request.seed))[0]


def test_guidance_extrapolates_from_the_negative_to_the_positive() -> None:
    model, latents, noise = sample("a --d 3 --s 4 --l 2.5")
    assert model.calls == [1.0, 0.0] * 4
    torch.testing.assert_close(latents, noise - 2.5)


def test_guidance_one_needs_no_second_pass() -> None:
    model, latents, noise = sample("a --d 3 --s 4 --l 1")
    assert model.calls == [1.0] * 4
    torch.testing.assert_close(latents, noise - 1)


def test_skipped_steps_are_not_guided() -> None:
    model, _, _ = sample("a --d 3 --s 4 --l 3", cfg_skip_mode="late", cfg_apply_ratio=0.5)
    assert model.calls == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]


def test_noise_is_a_function_of_the_seed() -> None:
    assert torch.equal(initial_noise((2, 3), seeded(5)), initial_noise((2, 3), seeded(5)))
    assert not torch.equal(initial_noise((2, 3), seeded(5)), initial_noise((2, 3), seeded(6)))


def test_noise_is_drawn_where_the_request_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device as the official code draws it, or on the CPU, where it is the same for everyone."""
    drawn: list[str] = []

    def draw(seed: int, device: torch.device = CPU) -> torch.Generator:
        drawn.append(device.type)
        return seeded(seed)

    class Meta(Recorder):
        def forward(self, latents: Tensor, timestep: Tensor, context: list[Tensor]) -> Tensor:
            return torch.zeros(latents.shape)

    monkeypatch.setattr(denoise, "seeded", draw)
    request = replace(parse_line("a --d 3 --s 2", preview_defaults(VARIANTS["t2v-1.3B"])), solver="euler")
    nothing = Conditions((torch.ones(1, 4),))
    for place in ("cpu", "device", "cuda"):
        drawn.clear()
        where = replace(request, rand_device=place)
        denoise.sample_latents(Meta(), where, nothing, nothing, device=torch.device("meta"), quiet=True)
        assert drawn == (["cpu"] if place == "cpu" else ["cpu", "meta"])


class ControlRecorder(nn.Module):
    """A model that keeps the control's channels and the scale of VACE of each call, and makes velocities of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.controls: list[float] = []
        self.starts: list[float] = []
        self.scales: list[float | None] = []
        self.shapes: set[tuple[int, ...]] = set()

    def forward(self, latents: Tensor, timestep: Tensor, context: list[Tensor], **inputs: Any) -> Tensor:
        if "image_latents" in inputs:
            self.controls.append(float(inputs["image_latents"][:, :16].mean()))
            self.starts.append(float(inputs["image_latents"][:, 16:, 0].mean()))
        self.scales.append(inputs.get("vace_scale"))
        self.shapes.add(tuple(latents.shape))
        return torch.zeros_like(latents)


def sample_controlled(task: str, extras: dict[str, Tensor], **changes: Any) -> tuple[ControlRecorder, Tensor]:
    request = replace(preview_defaults(VARIANTS[task]), prompt="a", seed=3, frames=5, width=32, height=32, steps=4)
    request = replace(request, solver="euler", **changes)
    model = ControlRecorder()
    both = (Conditions((torch.full((1, 4), value),), extras) for value in (1.0, 0.0))
    return model, sample_latents(model, request, *both, device=CPU, quiet=True)


@pytest.mark.parametrize("merge", [False, True])
def test_a_control_video_acts_between_its_shares_of_the_steps(merge: bool) -> None:
    extras = {"control_latents": torch.ones(1, 16, 2, 4, 4), "start_latents": torch.full((1, 16, 1, 4, 4), 2.0)}
    window = {"control_start": 0.25, "control_end": 0.75, "cfg_merge": merge}
    model, _ = sample_controlled("fun-control-14B", extras, **window)
    each = 1 if merge else 2  # passes of a step
    assert model.controls == [value for value in (0.0, 1.0, 1.0, 0.0) for _ in range(each)]
    assert model.starts == [2.0] * 4 * each  # the start image is there all the time


def test_vace_acts_between_its_shares_of_the_steps_and_references_are_dropped() -> None:
    context = torch.zeros(1, 96, 2 + 2, 4, 4)
    model, latents = sample_controlled("vace-14B", {"vace_context": context}, control_end=0.5, vace_scale=0.75)
    assert model.scales == [0.75] * 4 + [0.0] * 4
    assert model.shapes == {(1, 16, 4, 4, 4)} and latents.shape == (16, 2, 4, 4)
    assert torch.equal(latents, initial_noise((16, 4, 4, 4), seeded(3))[0, :, 2:])  # velocities are zeros


def test_control_models_without_a_control_read_zeros() -> None:
    model, _ = sample_controlled("fun-control-14B", {})
    assert model.controls == model.starts == [0.0] * 8


def test_two_experts_share_the_window_and_the_conditions() -> None:
    class Pair:
        def __init__(self) -> None:
            self.asked: dict[str, ControlRecorder] = {}

        def of(self, expert: str) -> ControlRecorder:
            return self.asked.setdefault(expert, ControlRecorder())

    request = replace(preview_defaults(VARIANTS["fun-control-A14B"]), prompt="a", seed=3, frames=5, width=32, height=32)
    request = replace(request, steps=8, solver="euler", guidance=1.0, guidance_high_noise=1.0, control_end=0.75)
    pair, extras = Pair(), {"control_latents": torch.ones(1, 16, 2, 4, 4)}
    text = Conditions((torch.ones(1, 4),), extras)
    sample_latents(pair, request, text, text, device=CPU, quiet=True)
    controls = [value for model in pair.asked.values() for value in model.controls]
    assert len(pair.asked) == 2 and controls == [1.0] * 6 + [0.0] * 2
