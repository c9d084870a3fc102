"""Windows over time: what each pass sees, how velocities blend, and what a request with them or with RIFLEx makes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.models.dit.test_dit import state
from wan_train.conditions.conditions import Conditions
from wan_train.errors import InputError
from wan_train.models.dit.dit import Dit
from wan_train.models.loading import load_dit
from wan_train.models.variants import VARIANTS
from wan_train.sampling.denoise import sample_latents
from wan_train.sampling.grammar import parse_line
from wan_train.sampling.length_settings import LengthOptions
from wan_train.sampling.passes import POSITIVE, Pass, PassName
from wan_train.sampling.request import SampleRequest, preview_defaults
from wan_train.sampling.windows import log_length, sliding_windows, window_starts, window_weights

CPU = torch.device("cpu")


def make_pass(frames: int, timestep: Tensor, **inputs: Any) -> Pass:
    latents = torch.randn(1, 16, frames, 2, 2, generator=torch.Generator().manual_seed(frames))
    return Pass(PassName(POSITIVE, skips=True), 3, latents, timestep, inputs)


@pytest.mark.parametrize(
    ("frames", "size", "stride", "starts"),
    [(21, 21, 10, [0]), (5, 9, 4, [0]), (21, 9, 6, [0, 6, 12]), (22, 9, 6, [0, 6, 12, 18]), (9, 3, 3, [0, 3, 6])],
)
def test_windows_cover_the_video(frames: int, size: int, stride: int, starts: list[int]) -> None:
    assert window_starts(frames, size, stride) == starts


def test_weights_rise_on_inner_sides_alone() -> None:
    ramp = [0.125, 0.375, 0.625, 0.875]
    assert window_weights(6, 4, is_first=True, is_last=False).tolist() == [1, 1, *reversed(ramp)]
    assert window_weights(6, 4, is_first=False, is_last=True).tolist() == [*ramp, 1, 1]
    assert window_weights(6, 4, is_first=False, is_last=False).tolist() == [*ramp[:3], *reversed(ramp[:3])]
    assert window_weights(3, 0, is_first=False, is_last=False).tolist() == [1, 1, 1]


def test_velocities_blend_by_the_weights() -> None:
    """Against the sum written out frame by frame; the model gives the window's number plus the latents."""
    size, stride, frames = 5, 3, 10
    one = make_pass(frames, torch.tensor([500.0]))
    velocity = sliding_windows(size, stride)(lambda each: each.latents + each.name.window)(one)
    for frame in range(frames):
        value = total = 0.0
        for index, start in enumerate((0, 3, 6)):
            if start <= frame < start + size:
                weight = 1.0
                if start and frame - start < 2:
                    weight = (frame - start + 0.5) / 2
                if start < 6 and start + size - 1 - frame < 2:
                    weight = (start + size - 1 - frame + 0.5) / 2
                value, total = value + weight * index, total + weight
        wanted = one.latents[:, :, frame] + value / total
        assert torch.allclose(velocity[:, :, frame], wanted, atol=1e-6)


def test_a_pass_of_a_window_sees_its_frames_of_what_has_frames() -> None:
    frames, before, seen = 7, 2, []
    every = torch.arange(before + frames, dtype=torch.float32)
    inputs: dict[str, Any] = {
        "image_latents": every.view(1, 1, -1, 1, 1).expand(1, 20, -1, 2, 2),
        "camera": every.view(1, 1, -1, 1, 1).expand(1, 24, -1, 16, 16),
        "vace_context": every.view(1, 1, -1, 1, 1).expand(1, 96, -1, 2, 2),
        "frame_positions": every,
        "reference_latents": torch.ones(1, 16, 1, 2, 2),
        "context": object(),
        "vace_scale": 0.5,
    }

    def run(one: Pass) -> Tensor:
        seen.append(one)
        return one.latents

    one = make_pass(before + frames, every[None], **inputs)
    assert torch.allclose(sliding_windows(4, 3, num_before=before)(run)(one), one.latents)
    for index, (window, chosen) in enumerate(zip(seen, ([2, 3, 4, 5], [5, 6, 7, 8]), strict=True)):
        numbers = torch.tensor([0, 1, *chosen])
        assert window.name == replace(one.name, window=index) and window.step == 3
        assert torch.equal(window.latents, one.latents[:, :, numbers])
        assert torch.equal(window.timestep, every[None, numbers])
        for name in ("image_latents", "camera", "vace_context"):
            assert torch.equal(window.inputs[name], inputs[name][:, :, numbers])
        assert torch.equal(window.inputs["frame_positions"], every[numbers])
        for name in ("reference_latents", "context", "vace_scale"):
            assert window.inputs[name] is inputs[name]


@pytest.fixture(scope="module")
def model() -> Dit:
    return load_dit(state(), config={"num_heads": 2})


def sample(model: Dit, line: str) -> Tensor:
    request = parse_line(f"a --w 32 --h 32 --s 2 --d 1 --l 3 {line}", preview_defaults(VARIANTS["t2v-1.3B"]))
    width = model.config.text_dim
    both = (Conditions((torch.full((3, width), value),)) for value in (0.5, -0.5))
    return sample_latents(model, request, *both, device=CPU, quiet=True)


def test_a_window_of_the_whole_video_and_riflex_within_the_trained_length_change_no_bit(model: Dit) -> None:
    plain = sample(model, "--f 33")
    for more in ("--sliding_window_size 9", "--sliding_window_size 30 --sliding_window_stride 7", "--riflex"):
        more = more.replace("--riflex", "--riflex --riflex_freq_index 2")
        assert torch.equal(sample(model, f"--f 33 {more}"), plain)
    assert not torch.equal(sample(model, "--f 33 --sliding_window_size 8"), plain)


def test_windows_of_both_prompts_in_one_batch_are_those_of_each(model: Dit) -> None:
    line = "--f 33 --sliding_window_size 4 --sliding_window_stride 3"
    assert torch.allclose(sample(model, f"{line} --cfg_merge"), sample(model, line), atol=1e-4)


def test_riflex_changes_videos_longer_than_trained_and_the_log_says_so(
    model: Dit, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "--f 193 --riflex --riflex_freq_index"
    plain = sample(model, "--f 193")
    assert not torch.equal(sample(model, f"{line} 1"), plain)
    assert "period of temporal RoPE frequency 1 set to 54.4 latent frames (was 6.3)" in capsys.readouterr().err
    windows = "--sliding_window_size 20 --sliding_window_stride 15"
    assert torch.equal(sample(model, f"{line} 1 {windows}"), sample(model, f"--f 193 {windows}"))
    assert "no effect on 20 latent frames, the model was trained with 21" in capsys.readouterr().err


def test_the_log_counts_the_frames_of_references(capsys: pytest.CaptureFixture[str]) -> None:
    """The model has them on its temporal axis: the first video that RIFLEx changes is shorter by as many."""
    log_length(LengthOptions(riflex=True, riflex_freq_index=1), 21, 21, num_before=1)
    assert "period of temporal RoPE frequency 1 set to 24.4 latent frames" in capsys.readouterr().err


def test_a_window_with_the_whole_video_is_told_to_have_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    log_length(LengthOptions(sliding_window_size=5), 6, 21)
    assert "sliding windows: 2 of at most 5 latent frames, stride 2" in capsys.readouterr().err
    log_length(LengthOptions(sliding_window_size=6), 6, 21)
    assert "--sliding_window_size 6 has no effect: the video has 6 latent frames" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--sliding_window_size 4 --sliding_window_stride 5", "must be at most --sliding_window_size 4"),
        ("--sliding_window_stride 5", "--sliding_window_size"),
        ("--sliding_window_size 0", "1"),
        ("--riflex_freq_index 4", "requires --riflex"),
        ("--riflex --riflex_freq_index 23", "22"),
    ],
)
def test_what_cannot_be_is_refused(line: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        parse_line(f"a {line}", preview_defaults(VARIANTS["t2v-1.3B"]))


def test_the_stride_is_half_a_window_by_default() -> None:
    def stride(line: str) -> int:
        request: SampleRequest = parse_line(f"a {line}", preview_defaults(VARIANTS["t2v-1.3B"]))
        return request.window_stride

    assert stride("--sliding_window_size 9") == 4
    assert stride("--sliding_window_size 1") == 1
    assert stride("--sliding_window_size 9 --sliding_window_stride 9") == 9


def test_the_frames_that_models_were_trained_with() -> None:
    trained: Mapping[str, int] = {name: VARIANTS[name].trained_frames for name in ("t2v-14B", "t2i-14B", "ti2v-5B")}
    assert trained == {"t2v-14B": 21, "t2i-14B": 21, "ti2v-5B": 31}


def test_a_line_without_riflex_needs_no_index() -> None:
    """The index that all lines have goes with `--riflex`."""
    plain = preview_defaults(VARIANTS["t2v-1.3B"])
    for_all = replace(plain, riflex=True, riflex_freq_index=4)
    assert parse_line("a cat --riflex false", for_all) == parse_line("a cat", plain)
    assert parse_line("a cat --riflex true", for_all).riflex_freq_index == 4
