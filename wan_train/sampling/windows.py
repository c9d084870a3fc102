"""What acts around the passes of a long video: windows over time, sampled by themselves at every step, and RIFLEx.

B batch, C channels, F latent frames, H W latent size.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wan_train.conditions.kinds import CAMERA, FRAME_POSITIONS, IMAGE_LATENTS, VACE_CONTEXT
from wan_train.log import get_logger
from wan_train.models.dit.rope import Riflex, frequency
from wan_train.sampling.length_settings import NUM_FREQUENCIES, LengthOptions
from wan_train.sampling.passes import Pass, Run, Wrap

log = get_logger(__name__)

# The axis of latent frames of what a pass reads frame by frame; everything else is for the whole video.
_FRAME_AXES = {IMAGE_LATENTS: 2, CAMERA: 2, VACE_CONTEXT: 2, FRAME_POSITIONS: 0}


def window_starts(frames: int, size: int, stride: int) -> list[int]:
    """Return where windows of `size` frames begin, `stride` apart; the last is cut off at the end of the video."""
    starts = itertools.takewhile(lambda start: start == 0 or start - stride + size < frames, itertools.count(0, stride))
    return list(starts)


def window_weights(length: int, border: int, *, is_first: bool, is_last: bool) -> Tensor:
    """Return the weights (length,) float32 of a window's frames, before those of all windows are made to add up to 1.

    On each side where another window overlaps it they rise over `border` frames as (k + 0.5) / border, k from 0
    (DiffSynth-Studio's temporal tiles); where both ramps meet in a frame the lower counts.
    """
    weights, positions = torch.ones(length), torch.arange(length)
    if border and not is_first:
        weights = torch.minimum(weights, (positions + 0.5) / border)
    if border and not is_last:
        weights = torch.minimum(weights, (positions.flip(0) + 0.5) / border)
    return weights


def sliding_windows(size: int, stride: int, *, num_before: int = 0) -> Wrap:
    """Make the wrap that runs a pass window by window and blends the velocities.

    A window has `size` of the video's latent frames, at positions from 0 in time, as DiffSynth-Studio does it. What
    the model reads frame by frame is cut with them: the latents, timesteps (B, F), latents of given images and of
    control videos, camera maps and VACE's context. The `num_before` latent frames in front of the video, of VACE's
    references, are in every window, and so is all that has no frames; their velocity is the mean of the windows'. A
    video that fits into one window is one pass, as without windows.
    """
    assert 1 <= stride <= size, "windows leave no frame out"

    def wrap(run: Run) -> Run:
        def run_windows(one: Pass) -> Tensor:
            frames = one.latents.shape[2] - num_before
            starts = window_starts(frames, size, stride)
            if len(starts) == 1:
                return run(one)
            blended = torch.zeros_like(one.latents, dtype=torch.float32)
            total = torch.zeros(one.latents.shape[2], device=one.latents.device)
            for index, start in enumerate(starts):
                end = min(start + size, frames)
                chosen = torch.tensor([*range(num_before), *range(num_before + start, num_before + end)])
                weights = window_weights(
                    end - start, size - stride, is_first=index == 0, is_last=index == len(starts) - 1
                )
                weights = torch.cat([torch.ones(num_before), weights]).to(total)
                chosen_there = chosen.to(total.device)
                velocity = run(_cut(one, chosen, index))
                blended.index_add_(2, chosen_there, velocity.float() * weights.view(-1, 1, 1))
                total.index_add_(0, chosen_there, weights)
            return blended / total.view(-1, 1, 1)

        return run_windows

    return wrap


def with_riflex(riflex: Riflex) -> Wrap:
    """Make the wrap that lets every pass of more latent frames than trained lower a temporal frequency."""
    return lambda run: lambda one: run(replace(one, inputs={**one.inputs, "riflex": riflex}))


def log_length(given: LengthOptions, num_frames: int, num_trained: int, *, num_before: int = 0) -> None:
    """Say in the log what `given` does to a video of `num_frames` latent frames, where `num_trained` were trained;
    `num_before` frames of references stand before the video's, or before a window's."""
    size = given.sliding_window_size
    if size is not None:
        count = len(window_starts(num_frames, size, given.window_stride))
        log.info("sliding windows: %d of at most %d latent frames, stride %d", count, size, given.window_stride)
        num_frames = min(num_frames, size)
    if not given.riflex:
        return
    num_frames += num_before
    index = given.riflex_freq_index
    period = 2 * math.pi / frequency(index, 2 * NUM_FREQUENCIES)
    if rate := Riflex(index, num_trained).rate(num_frames, 2 * NUM_FREQUENCIES):
        log.info(
            "RIFLEx: period of temporal RoPE frequency %d set to %.1f latent frames (was %.1f)",
            index,
            2 * math.pi / rate.radians,
            period,
        )
    elif num_frames <= num_trained:
        log.info("--riflex: no effect on %d latent frames, the model was trained with %d", num_frames, num_trained)
    else:
        log.warning(
            "--riflex: no effect on %d latent frames, the period of temporal frequency %d is %.1f: give a smaller"
            " --riflex_freq_index",
            num_frames,
            index,
            period,
        )


def _cut(one: Pass, chosen: Tensor, index: int) -> Pass:
    """The pass of the window `index`, of these latent frames."""
    timestep = one.timestep if one.timestep.ndim == 1 else _take(one.timestep, 1, chosen)
    name = replace(one.name, window=index)
    return replace(
        one, name=name, latents=_take(one.latents, 2, chosen), timestep=timestep, inputs=_cut_inputs(one.inputs, chosen)
    )


def _cut_inputs(inputs: Mapping[str, Any], chosen: Tensor) -> dict[str, Any]:
    return {
        name: _take(value, _FRAME_AXES[name], chosen) if name in _FRAME_AXES and value is not None else value
        for name, value in inputs.items()
    }


def _take(value: Tensor, axis: int, chosen: Tensor) -> Tensor:
    return value.index_select(axis, chosen.to(value.device))
