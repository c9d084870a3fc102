"""Estimate the memory of sampling and decoding a video: run the real code on the meta device."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wan_train.assemble import ModelSettings, equip
from wan_train.conditions.conditions import Conditions
from wan_train.conditions.kinds import CAMERA, CLIP_FEATURES, IMAGE_LATENTS, VACE_CONTEXT
from wan_train.models.dit.control import CAMERA_SHRINK
from wan_train.models.dit.dit import NUM_CLIP_TOKENS, Dit
from wan_train.models.settings import VaeSettings
from wan_train.models.vae.tiling import Tiling
from wan_train.models.vae.vae import outline_vae
from wan_train.models.variants import TEXT_LENGTH
from wan_train.placement.ledger import Ledger, OutlineLane
from wan_train.placement.settings import CompileSettings
from wan_train.placement.stream import Stream
from wan_train.plan import META, Bytes, outlined_dit, size, weights_of
from wan_train.precision import dtype_of
from wan_train.sampling.decode import STEADY
from wan_train.sampling.guidance import Guidance, guide, pass_names, plan_steps
from wan_train.sampling.passes import Wrap
from wan_train.sampling.request import SampleRequest
from wan_train.sampling.step_cache.caches import make_cache
from wan_train.sampling.step_cache.residuals import NoCache, StepCache
from wan_train.sampling.step_cache.schedule import CONSTANT, LINEAR, Schedule
from wan_train.sampling.step_cache.settings import AUTO, OFF
from wan_train.sampling.text_kv_cache import caching_text_kv
from wan_train.sampling.windows import sliding_windows


def dit_needs(
    settings: ModelSettings,
    requests: Sequence[SampleRequest],
    expert: str | None = None,
    *,
    dtype: torch.dtype | None,
    loras: Sequence[str] = (),
) -> Bytes:
    """Return the memory of a DiT, with these LoRA files merged, and of the largest step of the requests."""
    model = outlined_dit(settings, dtype=dtype, loras=loras)
    stream = equip(model, replace(settings, compile=CompileSettings()), OutlineLane(Ledger()))
    largest = max(step_bytes(model, stream, request, expert) for request in requests)
    return weights_of(model, stream) + Bytes(largest)


@torch.no_grad()
def step_bytes(model: Dit, stream: Stream, request: SampleRequest, expert: str | None = None) -> int:
    """Return the peak bytes, besides the weights, of the passes of a step, and of the step cache if there is one.

    `model` is on the meta device. Two steps are computed, because what a step cache keeps of the first is in memory
    during the second.
    """
    guidance = request.guided(expert)
    plans = plan_steps(request.steps, guidance, request.control_schedule)
    plan = max(plans, key=lambda one: (len(pass_names(one, guidance)), one.controlled))
    cache = _cache(request, guidance, guided=plan.guided)
    ledger = Ledger()
    ledger.leave_out(iter((*model.parameters(), *model.buffers(), *stream.slots)))
    with ledger:
        conditions = _conditions(model, request)
        channels, num_frames, *sides = request.latent_shape
        x = torch.empty(1, channels, num_frames + _num_references(request), *sides, device=META)
        predict = guide(
            model,
            conditions,
            conditions,
            guidance,
            controls=request.control_schedule,
            wraps=(cache.wrap, *_windows(request)),
            device=META,
        )
        num_tokens = math.prod(request.latent_shape[1:]) // 4
        with caching_text_kv(model, num_tokens), cache.around(model):
            for index in range(2 if request.step_cache != OFF else 1):
                predict(x, torch.tensor(500.0), replace(plan, index=index))
    return ledger.peak


def _cache(request: SampleRequest, guidance: Guidance, *, guided: bool) -> StepCache:
    """Return a step cache that keeps what its first two steps compute."""
    if request.step_cache == OFF:
        return NoCache()
    plans = plan_steps(request.steps, guidance, request.control_schedule)
    names = {name for plan in plans if plan.guided == guided for name in pass_names(plan, guidance)}
    order = LINEAR if request.step_cache == AUTO else CONSTANT
    return make_cache(request, Schedule({name: {2: order} for name in names}), torch.zeros(4))


def _windows(request: SampleRequest) -> list[Wrap]:
    if request.sliding_window_size is None:
        return []
    num_before = _num_references(request)
    return [sliding_windows(request.sliding_window_size, request.window_stride, num_before=num_before)]


def _num_references(request: SampleRequest) -> int:
    return len(request.vace_reference) if request.reads_vace else 0


def _conditions(model: Dit, request: SampleRequest) -> Conditions:
    """Return conditions of the request's shapes on the meta device: whatever the model reads is given."""
    config = model.config
    channels, num_frames, height, width = request.latent_shape
    extras: dict[str, Tensor] = {}
    if config.in_dim > channels:
        extras[IMAGE_LATENTS] = _empty(1, config.in_dim - channels, num_frames, height, width)
    if config.image_dim:
        num_tokens = config.image_positions or NUM_CLIP_TOKENS * max(1, len(request.clip_paths))
        extras[CLIP_FEATURES] = _empty(1, num_tokens, config.image_dim)
    if config.camera_dim:
        shape = num_frames, CAMERA_SHRINK * height, CAMERA_SHRINK * width
        extras[CAMERA] = _empty(1, config.camera_dim, *shape)
    if config.vace_dim and request.reads_vace:
        extras[VACE_CONTEXT] = _empty(1, config.vace_dim, _num_references(request) + num_frames, height, width)
    context = (_empty(TEXT_LENGTH, config.text_dim),)
    if request.variant.is_fused and request.image_paths:
        first, has_first = _empty(1, channels, 1, height, width), torch.ones(1, dtype=torch.bool, device=META)
        return Conditions(context, extras, first_frame=first, has_first=has_first)
    return Conditions(context, extras)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device=META)


def decoding_bytes(settings: VaeSettings, shape: tuple[int, int, int, int], *, tiled: bool) -> int:
    """Return the memory of the VAE and of decoding latents of this shape (C, F, H, W) as `decode_frames` does.

    Frames that `--vae_cache_cpu` brings back from CPU RAM for one layer are not counted.
    """
    vae = outline_vae(settings.vae, dtype_of(settings.vae_dtype))
    vae.cache_on_cpu = settings.vae_cache_cpu
    vae.tiling = Tiling(settings.vae_tile_size, settings.vae_tile_overlap) if tiled else None
    channels, num_frames, *sides = shape
    if not tiled:
        num_frames = min(num_frames, STEADY + 1)
    weights = sum(map(size, vae.parameters()))
    ledger = Ledger()
    ledger.leave_out(iter(vae.parameters()))
    with ledger:
        chunks = vae.decode_chunks(_empty(1, channels, num_frames, *sides))
        first = list(itertools.islice(chunks, STEADY))
        del first
        for _ in chunks:
            pass
    return weights + ledger.peak
