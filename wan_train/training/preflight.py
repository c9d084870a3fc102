"""Check everything about a run that can be checked before a model is loaded."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dataset.batching.batches import CachedDataset, open_cached, open_trusted
from dataset.config import DatasetConfig, read_config
from networks.adapter import MODULES, check_network, trains_weights
from networks.expert import warn_of_other_expert
from networks.lora_arguments import lora_arguments
from wan_train.assemble import check_model
from wan_train.errors import InputError, first_given
from wan_train.flow.timesteps import Span
from wan_train.log import get_logger
from wan_train.models.dit.experts import FLAGS
from wan_train.models.encoders.text import check_text_encoder
from wan_train.models.loading import linears_of
from wan_train.models.variants import VARIANTS, Variant
from wan_train.precision import name_of
from wan_train.quantization.stored import storage_dtype
from wan_train.remote.addresses import is_remote
from wan_train.remote.folder import RemoteFolder
from wan_train.sampling.request import SampleRequest
from wan_train.storage import check_writable, read_header
from wan_train.training.accelerator import check_launcher, launched_device, launched_dtype
from wan_train.training.control_checks import (
    check_control_settings,
    check_controller,
    check_controls,
    check_new_layers,
    model_shapes,
)
from wan_train.training.evaluating.validation import Data, check_validation, hold_out
from wan_train.training.experts.models import model_settings
from wan_train.training.experts.plan import ExpertPlan, plan_experts, settings_of
from wan_train.training.objective.loss import check_timesteps
from wan_train.training.objective.prior import read_captions
from wan_train.training.optimizing.optimizer_state import is_schedule_free
from wan_train.training.optimizing.optimizers import check_optimizer
from wan_train.training.optimizing.schedules import check_schedule
from wan_train.training.optimizing.stepping import check_stepping, needs_parts
from wan_train.training.reporting.audit import refuse_unused
from wan_train.training.reporting.preview import check_previews
from wan_train.training.reporting.trackers import check_trackers
from wan_train.training.saving.hub import check_hub, fetch_state
from wan_train.training.saving.remote_output import fetch_named_state
from wan_train.training.saving.resume import find_state
from wan_train.training.saving.state import State
from wan_train.training.settings import TrainSettings

log = get_logger(__name__)


@dataclass(frozen=True)
class RunPlan:
    """Results of the preflight checks."""

    variant: Variant
    configs: tuple[DatasetConfig, ...]
    requests: list[SampleRequest]
    prior_captions: list[str]
    experts: ExpertPlan
    state: State | None


def preflight(settings: TrainSettings, remote: RemoteFolder | None = None) -> RunPlan:
    """Raise InputError for whatever cannot work, from options and file headers alone; test the `remote` output folder
    by writing to it."""
    variant = VARIANTS[settings.dit.task]
    experts = plan_experts(settings)
    check_output_name(settings.save.output_name)
    ours = MODULES[0] in (settings.network.network_module, settings.network.train_also)
    several_rates = ours and lora_arguments(settings.network).loraplus_lr_ratio != 1
    kind, _ = check_optimizer(
        settings.optimizer,
        several_rates=several_rates,
        rounded=settings.network.full_bf16,
        one_by_one_option=needs_parts(settings),
    )
    check_stepping(settings)
    if settings.loop.ema_decay is not None and is_schedule_free(kind):
        raise InputError(
            f"--ema_decay {settings.loop.ema_decay:g}: {settings.optimizer.optimizer_type} already averages "
            "the weights: leave out --ema_decay"
        )
    if experts.is_pair and not settings.experts.shared_lora and is_schedule_free(kind):
        raise InputError(
            f"--optimizer_type {settings.optimizer.optimizer_type} averages the weights at every step, which does not"
            " work with alternating experts: use another optimizer"
        )
    check_schedule(settings.optimizer)
    check_timesteps(settings.timesteps, limits=limits_of(settings, experts))
    check_images_settings(settings, variant)
    check_control_settings(settings, variant)
    check_validation(settings.validation)
    check_trackers(settings.logs)
    check_launcher()
    check_hub(settings.hub, settings.save.resume)
    configs = read_configs(settings.data.dataset_config, settings)
    captions = check_prior(settings)
    device, computing = launched_device(), launched_dtype(settings.loop)
    for expert in experts.trained or (None,):
        its = settings_of(settings, expert)
        if trains_weights(its.network):
            check_full(its)
        elif its.save.max_shard_size is not None:
            raise InputError("--max_shard_size is for the checkpoints of networks.full: leave it out for a LoRA")
        warning = check_model(model_settings(its), variant, device, computing=computing, flag=FLAGS[expert])
        slow = None if settings.loop.mixed_precision else float32_warning(device, its.dit.dit, computing, FLAGS[expert])
        for told in filter(None, (warning, slow)):
            log.warning(told)
        shapes = model_shapes(its, its.dit.dit)
        check_new_layers(its, shapes)
        check_network(its.network, linears_of(shapes), shapes)
        if expert is not None and not settings.experts.shared_lora:
            for path in filter(None, (its.network.network_weights, *its.network.base_weights)):
                warn_of_other_expert(path, expert)
    check_pair_previews(settings, experts)
    requests = check_previews(settings, variant)
    if not settings.experts.allow_unused_timesteps:
        refuse_unused(experts, settings.timesteps)
    check_folders(settings, remote)
    return RunPlan(variant, configs, requests, captions, experts, find_state(fetched(settings), remote))


def check_folders(settings: TrainSettings, remote: RemoteFolder | None) -> None:
    """Raise InputError for an output folder that is not writable."""
    check_writable(settings.save.output_dir)
    if settings.profile.profile:
        check_writable(settings.profile.profile)
    if remote is not None:
        remote.check_writable("--output_dir")


def float32_warning(device: torch.device, path: str, computing: torch.dtype, flag: str) -> str | None:
    """Return a warning if a GPU would compute in float32 by default although the file `path`, given by the option
    `flag`, is in half precision; None otherwise."""
    stored = storage_dtype(read_header(path))
    if device.type == "cpu" or computing != torch.float32 or stored.itemsize > 2:
        return None
    short = "fp16" if stored == torch.float16 else "bf16"
    return (
        f"{flag} {path} is stored in {name_of(stored)} and computed in float32 without --mixed_precision, which takes "
        f"several times as long and twice the GPU memory: use --mixed_precision {short}, or no to keep float32"
    )


def check_full(settings: TrainSettings) -> None:
    """Raise InputError for options that conflict with full fine-tuning."""
    weights = settings.weights
    given = {
        "--fp8_base": weights.fp8_base,
        "--fp8_scaled": weights.fp8_scaled,
        "--int8_base": weights.int8_base,
        "--prior_captions": settings.prior.prior_captions,
        "--shared_lora": settings.experts.shared_lora,
        "--offload_inactive_dit": settings.experts.offload_inactive_dit,
    }
    if flag := first_given(given):
        raise InputError(
            f"{flag} does not work with {settings.network.network_module}, which trains all weights: leave it out"
        )
    stored = read_header(settings.dit.dit).dtypes if settings.dit.dit else {}
    if any(dtype.itemsize == 1 for dtype in stored.values()):
        raise InputError(
            f"--dit {settings.dit.dit} is stored in 8 bits, which cannot be trained: give a bf16, fp16 or fp32 file"
        )


def limits_of(settings: TrainSettings, experts: ExpertPlan) -> tuple[Span | None, ...]:
    """Return the noise levels of each trained expert; None means those of the settings."""
    return tuple(experts.limits(expert, settings.timesteps) for expert in experts.trained) or (None,)


def check_images_settings(settings: TrainSettings, variant: Variant) -> None:
    """Raise InputError for image options that do not apply to the task."""
    images = settings.images
    if images.image_dropout_rate and (variant.images is None or variant.is_fused):
        way = "give --i2v_ratio" if variant.is_fused else "leave it out"
        raise InputError(f"--image_dropout_rate: --task {variant.name} has no images to drop: {way}")
    if images.i2v_ratio is not None and not variant.is_fused:
        raise InputError(
            f"--i2v_ratio: --task {variant.name} is not a combined text- and image-to-video model: leave it out"
        )


def check_pair_previews(settings: TrainSettings, experts: ExpertPlan) -> None:
    """Raise InputError for previews of a task with two experts when only one is loaded: generation needs both."""
    if experts.trained and not experts.is_pair and settings.preview.sample_prompts is not None:
        raise InputError(
            "--sample_prompts: previews need both experts: give --dit and --dit_high_noise, which trains both, or"
            " leave out the previews"
        )


def fetched(settings: TrainSettings) -> TrainSettings:
    """Download the state if `--resume` is a hub path or a URL, and return the settings with its local folder."""
    resume = settings.save.resume
    if resume is None:
        return settings
    if settings.hub.resume_from_huggingface:
        folder = fetch_state(resume, settings.hub.huggingface_token)
    elif is_remote(resume):
        folder = fetch_named_state(resume)
    else:
        return settings
    return replace(settings, save=replace(settings.save, resume=str(folder)))


def read_configs(path: str, settings: TrainSettings) -> tuple[DatasetConfig, ...]:
    """Read the datasets of a TOML file; with trusted caches the media need not exist."""
    variant = VARIANTS[settings.dit.task]
    return read_config(
        path,
        with_sources=not settings.caches.trust_cache,
        images=variant.images,
        control=variant.control,
        space=variant.space,
        one_frame=settings.images.one_frame,
    )


def open_data(settings: TrainSettings, configs: tuple[DatasetConfig, ...]) -> Data:
    """Open the training and validation data, and check that noise levels can be drawn for their sizes."""
    data = hold_out(
        open_dataset(configs, settings),
        settings.validation,
        lambda path: open_dataset(read_configs(path, settings), settings),
    )
    check_controller(data.training, settings)
    stride = VARIANTS[settings.dit.task].space.stride
    sizes = {(bucket.size[1] // stride, bucket.size[0] // stride) for bucket in data.training.buckets}
    check_timesteps(settings.timesteps, sizes, limits_of(settings, plan_experts(settings)))
    return data


def open_dataset(configs: tuple[DatasetConfig, ...], settings: TrainSettings) -> CachedDataset:
    """Open the caches, and compare them with the source files unless they are trusted."""
    data = settings.data
    if settings.caches.trust_cache:
        dataset = open_trusted(configs)
    else:
        dataset = open_cached(configs, allow_missing_captions=data.allow_missing_captions, skip_broken=data.skip_broken)
    check_controls(dataset, settings)
    return dataset


def check_output_name(name: str) -> None:
    """Raise InputError for a name that is not a plain file name."""
    if not name.strip() or name != os.path.basename(name) or name.startswith("."):
        raise InputError(f"--output_name {name!r} must be a plain file name; folders go into --output_dir")


def check_prior(settings: TrainSettings) -> list[str]:
    """Read the captions of `--prior_captions`, and check that the text encoder is given."""
    path = settings.prior.prior_captions
    if path is None:
        return []
    if not settings.text.t5:
        raise InputError(f"--prior_captions {Path(path).name} needs --t5: give the text encoder")
    check_text_encoder(settings.text.t5, settings.text.tokenizer or "auto")
    return read_captions(path)
