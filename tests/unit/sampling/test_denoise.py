from dataclasses import replace

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
