"""All checks of the generator that are possible before a model is loaded."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import torch

from generate.jobs import Job
from generate.models import Loras, model_settings
from generate.record import weight_hashes
from generate.settings import GenerateSettings, LoraSettings
from generate.source import fit_to_source
from generate.splitting import check_split_frames, check_split_models
from networks.expert import warn_of_other_expert
from networks.formats.files import check_deltas
from wan_train.assemble import WeightedLora, check_model
from wan_train.errors import InputError, first_given
from wan_train.log import get_logger
from wan_train.models.dit.experts import FLAGS, HIGH, experts_of
from wan_train.models.encoders.text import check_text_encoder
from wan_train.models.loading import linear_shapes, num_blocks
from wan_train.models.vae.vae import check_vae
from wan_train.models.variants import VARIANTS, Variant
from wan_train.sampling.encode import check_encodable, check_given_clip
from wan_train.sampling.request import SampleRequest
from wan_train.sampling.step_cache.profile import check_cache
from wan_train.sampling.step_cache.settings import PROFILED
from wan_train.storage import check_writable

log = get_logger(__name__)


def weighted_loras(settings: LoraSettings, expert: str | None = None) -> list[WeightedLora]:
    """Return the LoRA files, with two experts those of `expert`, with multipliers; missing ones are 1.0."""
    ending = "_high_noise" if expert == HIGH else ""
    files: tuple[str, ...] = getattr(settings, f"lora_weight{ending}")
    multipliers: tuple[float, ...] = getattr(settings, f"lora_multiplier{ending}")
    if len(multipliers) > len(files):
        raise InputError(
            f"{len(multipliers)} --lora_multiplier{ending} for {len(files)} --lora_weight{ending}: "
            "give at most one per file"
        )
    pairs = zip_longest(files, multipliers, fillvalue=1.0)
    patterns = settings.include_patterns, settings.exclude_patterns
    return [WeightedLora(str(path), float(multiplier), *patterns) for path, multiplier in pairs]


def check_generation(settings: GenerateSettings, device: torch.device, *, wants_frames: bool) -> Loras:
    """Check all models by their headers and tiny trial runs, and return the LoRA files by expert.

    Raises InputError for models that cannot generate videos.
    """
    variant = VARIANTS[settings.dit.task]
    check_split_models(settings)
    check_experts(settings, variant)
    for expert in experts_of(variant):
        if warning := check_model(model_settings(settings, expert), variant, device, flag=FLAGS[expert]):
            log.warning(warning)
    if not settings.text.t5:
        raise InputError("--t5 is missing: give the UMT5-XXL encoder file")
    check_text_encoder(settings.text.t5, settings.text.tokenizer or "auto")
    if variant.images or variant.control:
        check_given_vae(settings)
        check_given_clip(settings.image, variant, settings.dit)
    elif wants_frames:
        check_given_vae(settings, ", or --output_type latent")
    if settings.output.text_cache:
        check_writable(settings.output.text_cache)
    if settings.profile.profile:
        check_writable(settings.profile.profile)
    return {expert: check_loras(settings, expert) for expert in experts_of(variant)}


def check_experts(settings: GenerateSettings, variant: Variant) -> None:
    """Raise InputError for a missing expert, and for expert options of a task with a single model."""
    if variant.experts is not None:
        for flag, path in (("--dit", settings.dit.dit), ("--dit_high_noise", settings.experts.dit_high_noise)):
            if not path:
                raise InputError(f"{flag} is missing: --task {variant.name} has two models, give both")
        return
    given = {
        "--dit_high_noise": settings.experts.dit_high_noise,
        "--lora_weight_high_noise": settings.lora.lora_weight_high_noise,
        "--lora_multiplier_high_noise": settings.lora.lora_multiplier_high_noise,
        "--guidance_scale_high_noise": settings.sampling.guidance_scale_high_noise is not None,
        "--offload_inactive_dit": settings.experts.offload_inactive_dit,
        "--lazy_loading": settings.experts.lazy_loading,
    }
    if extra := first_given(given):
        raise InputError(f"{extra}: --task {variant.name} has a single model: use an A14B task, or leave it out")


def check_given_vae(settings: GenerateSettings, instead: str = "") -> None:
    """Raise InputError for a missing or invalid VAE; `instead` names an alternative in the message."""
    check_split_frames(settings)
    if not settings.vae.vae:
        raise InputError(f"--vae is missing: give {VARIANTS[settings.dit.task].space.vae_file}{instead}")
    check_vae(settings.vae.vae, latent_channels=VARIANTS[settings.dit.task].space.channels)


def check_loras(settings: GenerateSettings, expert: str | None = None) -> list[WeightedLora]:
    """Return the LoRA files with their multipliers. Raises InputError for one that does not match the model."""
    loras = weighted_loras(settings.lora, expert)
    shapes = linear_shapes(model_settings(settings, expert).dit.dit)
    if expert != HIGH and (settings.lora.include_patterns or settings.lora.exclude_patterns) and not loras:
        raise InputError("--include_patterns and --exclude_patterns require --lora_weight: give at least one LoRA file")
    for lora in loras:
        if expert is not None:
            warn_of_other_expert(lora.path, expert)
        check_deltas(lora.path, shapes, lora.choose)
    return loras


def fitted_jobs(jobs: Sequence[Job], settings: GenerateSettings) -> list[Job]:
    """Return the jobs, each no longer than its source video.

    Raises InputError for a source video that cannot be read, and for anything that the models lack: blocks to skip,
    layers for a control, an image encoder.
    """
    variant, blocks = VARIANTS[settings.dit.task], num_blocks(settings.dit.dit)
    dits = [model_settings(settings, expert).dit for expert in experts_of(variant)]
    for job in jobs:
        check_encodable(job.request, settings.image, dits)
        beyond = [layer for layer in job.request.slg_layers if layer >= blocks]
        if beyond:
            raise InputError(f"--slg_layers {beyond[0]} does not exist: the model has blocks 0 to {blocks - 1}")
    if any(job.request.video_path for job in jobs):
        check_given_vae(settings)
    fitted = [replace(job, request=fit_to_source(job.request, variant.fps)) for job in jobs]
    if settings.calibration.calibrate_steps is None:
        _check_caches([job.request for job in fitted], settings)
    return fitted


def _check_caches(requests: Sequence[SampleRequest], settings: GenerateSettings) -> None:
    """InputError for a step cache that cannot act on a request, whose length is final."""
    hashes = weight_hashes(settings) if any(request.step_cache in PROFILED for request in requests) else None
    for request in requests:
        check_cache(request, is_compiled=settings.compile.compile, models=hashes)
