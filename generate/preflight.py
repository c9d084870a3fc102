"""Everything about a run of the generator that can be known, and refused, before a model is loaded."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import torch

from generate.jobs import Job
from generate.models import model_settings
from generate.settings import GenerateSettings, LoraSettings
from generate.source import fit_to_source
from networks.formats import check_lora
from networks.selection import filter_modules
from wan_train.assemble import WeightedLora, check_model
from wan_train.cli import InputError
from wan_train.log import get_logger
from wan_train.models.loading import linear_shapes, num_blocks
from wan_train.models.text_encoder import check_text_encoder
from wan_train.models.vae import check_vae
from wan_train.models.variants import VARIANTS
from wan_train.sampling.encode import check_given_clip
from wan_train.storage import check_writable

log = get_logger(__name__)


def weighted_loras(settings: LoraSettings) -> list[WeightedLora]:
    """The LoRA files with their multipliers, 1.0 where fewer multipliers than files are given."""
    if len(settings.lora_multiplier) > len(settings.lora_weight):
        raise InputError(
            f"{len(settings.lora_multiplier)} --lora_multiplier for {len(settings.lora_weight)} --lora_weight: "
            "give at most one for each file"
        )
    pairs = zip_longest(settings.lora_weight, settings.lora_multiplier, fillvalue=1.0)
    patterns = settings.include_patterns, settings.exclude_patterns
    return [WeightedLora(str(path), float(multiplier), *patterns) for path, multiplier in pairs]


def check_generation(settings: GenerateSettings, device: torch.device, *, wants_frames: bool) -> list[WeightedLora]:
    """Refuse models that cannot make videos, by headers and tiny trials alone; the LoRA files that take part."""
    if warning := check_model(model_settings(settings), VARIANTS[settings.dit.task], device):
        log.warning(warning)
    if not settings.text.t5:
        raise InputError("--t5 is missing: give the UMT5-XXL encoder file")
    check_text_encoder(settings.text.t5, settings.text.tokenizer or "auto")
    if VARIANTS[settings.dit.task].images:
        check_given_vae(settings)
        check_given_clip(settings.image, VARIANTS[settings.dit.task], settings.dit.dit)
    elif wants_frames:
        check_given_vae(settings, ", or --output_type latent")
    if settings.output.text_cache:
        check_writable(settings.output.text_cache)
    return check_loras(settings)


def check_given_vae(settings: GenerateSettings, instead: str = "") -> None:
    """Refuse a VAE that is missing or none; `instead` says what would do without."""
    if not settings.vae.vae:
        raise InputError(f"--vae is missing: give Wan2.1_VAE.pth{instead}")
    check_vae(settings.vae.vae)


def check_loras(settings: GenerateSettings) -> list[WeightedLora]:
    """The LoRA files with their multipliers. InputError for one that is of another model."""
    loras, shapes = weighted_loras(settings.lora), linear_shapes(settings.dit.dit)
    if (settings.lora.include_patterns or settings.lora.exclude_patterns) and not loras:
        raise InputError("--include_patterns and --exclude_patterns choose modules of --lora_weight: give one")
    for lora in loras:
        filter_modules(check_lora(lora.path, shapes), lora.include, lora.exclude)
    return loras


def fitted_jobs(jobs: Sequence[Job], settings: GenerateSettings) -> list[Job]:
    """The jobs with as many frames as the videos that they begin with have. InputError for one that does not read, and
    for blocks to skip that the model does not have."""
    fps, blocks = VARIANTS[settings.dit.task].fps, num_blocks(settings.dit.dit)
    for job in jobs:
        beyond = [layer for layer in job.request.slg_layers if layer >= blocks]
        if beyond:
            raise InputError(f"--slg_layers {beyond[0]} is not there: the model has blocks 0 to {blocks - 1}")
    if any(job.request.video_path for job in jobs):
        check_given_vae(settings)
    return [replace(job, request=fit_to_source(job.request, fps)) for job in jobs]
