"""Wraps for long videos: temporal sliding windows, denoised separately at every step, and RIFLEx.

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

# Inputs with an axis of latent frames, which windows cut; all others apply to the whole video.
_FRAME_AXES = {IMAGE_LATENTS: 2, CAMERA: 2, VACE_CONTEXT: 2, FRAME_POSITIONS: 0}


def window_starts(frames: int, size: int, stride: int) -> list[int]:
    """Return the first frames of windows of `size` frames with this stride; the last is cut at the end of the video."""
    starts = itertools.takewhile(lambda start: start == 0 or start - stride + size < frames, itertools.count(0, stride))
    return list(starts)


def window_weights(length: int, border: int, *, is_first: bool, is_last: bool) -> Tensor:
    """Return the blending weights (length,) float32 of a window's frames, not normalised over the windows.

    On each side that overlaps another window they rise over `border` frames as (k + 0.5) / border, k from 0
    (DiffSynth-Studio's temporal tiles); where both ramps overlap, the lower value is used.
    """
    weights, positions = torch.ones(length), torch.arange(length)
    if border and not is_first:
        weights = torch.minimum(weights, (positions + 0.5) / border)
    if border and not is_last:
        weights = torch.minimum(weights, (positions.flip(0) + 0.5) / border)
    return weights


def sliding_windows(size: int, stride: int, *, num_before: int = 0) -> Wrap:
    """Return the wrap that runs a pass window by window and blends the velocities.

    A window has `size` latent frames, at temporal positions from 0, as in DiffSynth-Studio. Inputs with latent frames
    are cut to the window: latents, timesteps (B, F), latents of images and control videos, camera maps and the VACE
    context. Every window contains the `num_before` latent frames of VACE references, which precede the video and
    whose velocity is averaged over the windows, and all inputs without frames. A video that fits into one window is
    a single pass, as without windows.
    """
    assert 1 <= stride <= size, "a larger stride skips frames"

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
    """Return the wrap that applies RIFLEx to every pass with more latent frames than trained."""
    return lambda run: lambda one: run(replace(one, inputs={**one.inputs, "riflex": riflex}))


def log_length(given: LengthOptions, num_frames: int, num_trained: int, *, num_before: int = 0) -> None:
    """Log the effect of `given` on a video of `num_frames` latent frames, for a model trained with `num_trained`.

    `num_before` frames of references precede the video, or each window.
    """
    size = given.sliding_window_size
    if size is not None:
        count = len(window_starts(num_frames, size, given.window_stride))
        if count == 1:
            log.info("--sliding_window_size %d has no effect: the video has %d latent frames", size, num_frames)
        else:
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
    """Return the pass of window `index`, with these latent frames."""
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
