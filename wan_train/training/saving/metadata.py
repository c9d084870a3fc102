"""Metadata of saved files: what was trained, on what data and how (`ss_*` and `modelspec.*` keys, as in kohya's
tools)."""

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from networks.adapter import trains_weights
from networks.expert import KEY as EXPERT_KEY
from wan_train.models.fingerprint import fingerprint
from wan_train.models.variants import VARIANTS
from wan_train.packages import is_installed
from wan_train.training.experts.plan import settings_of
from wan_train.training.settings import TrainSettings
from wan_train.version import __version__

LIBRARIES = ("torch", "accelerate", "transformers", "diffusers", "safetensors", "bitsandbytes")
# Keys that a loader needs to rebuild the network; `--no_metadata` keeps only these.
MINIMAL = ("ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")


@dataclass(frozen=True)
class RunFacts:
    """Facts known when a run starts."""

    seed: int
    num_items: int
    batches_per_epoch: int
    num_epochs: int
    max_steps: int
    warmup: int
    mixed_precision: str
    datasets: str  # JSON
    started_at: float
    session_id: int


def training_metadata(settings: TrainSettings, facts: RunFacts, network: Mapping[str, str]) -> dict[str, str]:
    """Return the `ss_*` rows of the whole run; all values are text."""
    loop, optimizer, timesteps = settings.loop, settings.optimizer, settings.timesteps
    base = settings.dit.dit or settings.experts.dit_high_noise
    arguments = f"({', '.join(optimizer.optimizer_args)})" if optimizer.optimizer_args else ""
    rows: dict[str, object] = {
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_output_name": settings.save.output_name,
        "ss_learning_rate": optimizer.learning_rate,
        "ss_num_train_items": facts.num_items,
        "ss_num_batches_per_epoch": facts.batches_per_epoch,
        "ss_num_epochs": facts.num_epochs,
        "ss_gradient_checkpointing": settings.activations.recompute != "none",
        "ss_gradient_checkpointing_cpu_offload": settings.activations.gradient_checkpointing_cpu_offload,
        "ss_gradient_accumulation_steps": loop.gradient_accumulation_steps,
        "ss_max_train_steps": facts.max_steps,
        "ss_lr_warmup_steps": facts.warmup,
        "ss_lr_scheduler": optimizer.lr_scheduler,
        "ss_base_model_version": "wan",
        "ss_mixed_precision": facts.mixed_precision,
        "ss_seed": facts.seed,
        "ss_training_comment": settings.save.training_comment,
        "ss_optimizer": optimizer.optimizer_type + arguments,
        "ss_max_grad_norm": loop.max_grad_norm,
        "ss_fp8_base": settings.weights.fp8_base,
        "ss_full_fp16": False,
        "ss_full_bf16": settings.network.full_bf16,
        "ss_weighting_scheme": timesteps.weighting_scheme,
        "ss_logit_mean": timesteps.logit_mean,
        "ss_logit_std": timesteps.logit_std,
        "ss_mode_scale": timesteps.mode_scale,
        "ss_guidance_scale": None,  # embedded guidance, which Wan does not have
        "ss_timestep_sampling": timesteps.timestep_sampling,
        "ss_sigmoid_scale": timesteps.sigmoid_scale,
        "ss_discrete_flow_shift": timesteps.discrete_flow_shift,
        "ss_min_timestep": timesteps.min_timestep,
        "ss_max_timestep": timesteps.max_timestep,
        "ss_preserve_distribution_shape": timesteps.preserve_distribution_shape,
        "ss_num_timestep_buckets": timesteps.num_timestep_buckets,
        "ss_loss_type": settings.loss.loss_type,
        "ss_datasets": facts.datasets,
        "ss_sd_model_name": Path(base).name,
        "ss_vae_name": Path(settings.vae.vae).name if settings.vae.vae else None,
        "ss_t5_name": Path(settings.text.t5).name if settings.text.t5 else None,
        "ss_base_fingerprint": fingerprint(base),
        "ss_wan_task": settings.dit.task,
        "ss_wan_train_version": __version__,
        "ss_library_versions": json.dumps(library_versions()),
    }
    if settings.init.init_control is not None:
        rows["wan_train_init_control"] = settings.init.init_control
    if settings.dit.motion_controller:
        rows["wan_train_motion_controller"] = Path(settings.dit.motion_controller).name
    return {key: str(value) for key, value in rows.items()} | dict(network)


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect the results."""
    installed = {name: version(name) for name in LIBRARIES if is_installed(name)}
    return {"python": platform.python_version()} | installed


def saved_metadata(settings: TrainSettings, common: Mapping[str, str], *, step: int, epoch: int) -> dict[str, str]:
    """Return the metadata of one file: the run's rows, the step at which it was saved, and the model specification."""
    if settings.save.no_metadata:
        return {key: common[key] for key in MINIMAL if key in common}
    moment = {"ss_steps": str(step), "ss_epoch": str(epoch), "ss_training_finished_at": str(time.time())}
    return dict(common) | moment | _model_spec(settings)


def expert_metadata(settings: TrainSettings, expert: str | None) -> dict[str, str]:
    """Return additional rows for the file of one expert; empty for a task with a single model."""
    if expert is None or settings.save.no_metadata:
        return {} if expert is None else {EXPERT_KEY: expert}
    path = settings_of(settings, expert).dit.dit
    return {EXPERT_KEY: expert, "ss_sd_model_name": Path(path).name, "ss_base_fingerprint": fingerprint(path)}


def _model_spec(settings: TrainSettings) -> dict[str, str]:
    """Return the sai_model_spec 1.0.0 rows that model managers show."""
    save, variant = settings.save, VARIANTS[settings.dit.task]
    size = variant.size
    rows = {
        "sai_model_spec": "1.0.0",
        "architecture": save.metadata_arch or variant.family + "/lora" * (not trains_weights(settings.network)),
        "implementation": "https://github.com/Wan-Video/Wan2.1",
        "title": save.metadata_title or save.output_name,
        "resolution": save.metadata_reso or f"{size[0]}x{size[1]}",
        "date": datetime.now(UTC).replace(microsecond=0, tzinfo=None).isoformat(),
        "author": save.metadata_author,
        "description": save.metadata_description,
        "license": save.metadata_license,
        "tags": save.metadata_tags,
        "timestep_range": f"{settings.timesteps.min_timestep},{settings.timesteps.max_timestep}",
    }
    return {f"modelspec.{key}": value for key, value in rows.items() if value is not None}
