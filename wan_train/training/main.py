"""A training run from its settings: check everything, then build it in order and train."""

import os
import random
import sys
import time
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset

from dataset.batches import Batch, CachedDataset, collate, open_cached, open_trusted
from dataset.config import DatasetConfig, read_config
from dataset.epochs import EpochBatches
from dataset.summary import metadata, summarise
from networks.adapter import check_module
from wan_train.assemble import ModelSettings, assemble_dit, attach_adapter, check_model, finish_dit
from wan_train.cli import InputError
from wan_train.log import get_logger
from wan_train.models.text_encoder import check_text_encoder
from wan_train.models.vae import check_vae
from wan_train.models.variants import VARIANTS, Variant
from wan_train.precision import dtype_of, name_of
from wan_train.sampling.decode import open_vae
from wan_train.sampling.encode import encode_prompts
from wan_train.sampling.request import SampleRequest, preview_defaults, read_prompts
from wan_train.storage import check_writable
from wan_train.training.accelerator import agree_on_seed, launched_device, make_accelerator, prepare_model
from wan_train.training.loop import Run, run_length, train
from wan_train.training.metadata import RunFacts, training_metadata
from wan_train.training.metrics import MetricsWriter
from wan_train.training.optimizers import check_optimizer, make_optimizer
from wan_train.training.preview import Previewer
from wan_train.training.schedules import make_schedule, warmup_steps
from wan_train.training.settings import LoopSettings, TrainSettings

log = get_logger(__name__)


@dataclass(frozen=True)
class Plan:
    """What the preflight found out."""

    variant: Variant
    configs: tuple[DatasetConfig, ...]
    requests: list[SampleRequest]


def main(settings: TrainSettings) -> None:
    """Train as the settings say. Raises InputError, before a model is loaded, for what cannot work."""
    plan = preflight(settings)
    dataset = open_dataset(plan.configs, settings)
    accelerator = make_accelerator(settings.loop)
    seed = agree_on_seed(settings.loop.seed)
    set_seed(seed % 2**32)
    run = build(settings, plan, dataset, accelerator, seed)
    length, processes = run.length, accelerator.num_processes
    log.info("%d steps, %d epochs, %d process(es) on %s", length.steps, length.epochs, processes, accelerator.device)
    try:
        path = train(run)
    finally:
        if run.writer is not None:
            run.writer.close()
    if accelerator.is_main_process:
        log.info("done: %s", path)
    accelerator.end_training()


def open_dataset(configs: tuple[DatasetConfig, ...], settings: TrainSettings) -> CachedDataset:
    """What the caches hold, compared with the sources unless they are trusted."""
    if settings.caches.trust_cache:
        return open_trusted(configs)
    data = settings.data
    return open_cached(configs, allow_missing_captions=data.allow_missing_captions, skip_broken=data.skip_broken)


def preflight(settings: TrainSettings) -> Plan:
    """Refuse what cannot work, from options and headers alone."""
    variant = VARIANTS[settings.dit.task]
    check_output_name(settings.save.output_name)
    check_module(settings.network)
    check_optimizer(settings.optimizer)
    warmup_steps(
        settings.optimizer.lr_warmup_steps, total=sys.maxsize
    )  # how it reads; its size once the run's is known
    configs = read_config(settings.data.dataset_config, with_sources=not settings.caches.trust_cache)
    requests = check_previews(settings, variant)
    if warning := check_model(model_settings(settings), variant, launched_device()):
        log.warning(warning)
    check_writable(settings.save.output_dir)
    return Plan(variant, configs, requests)


def model_settings(settings: TrainSettings) -> ModelSettings:
    """What the settings say about the DiT."""
    return ModelSettings(settings.dit, settings.weights, settings.stream, settings.activations, settings.compile)


def check_output_name(name: str) -> None:
    """InputError for a name that is not one plain file name."""
    if not name.strip() or name != os.path.basename(name) or name.startswith("."):
        raise InputError(f"--output_name {name!r} must be a plain file name; folders go into --output_dir")


def check_previews(settings: TrainSettings, variant: Variant) -> list[SampleRequest]:
    """The previews' requests, once all that they need is there."""
    preview = settings.preview
    if preview.sample_prompts is None:
        if preview.sample_every_n_epochs or preview.sample_every_n_steps or preview.sample_at_first:
            raise InputError("previews need --sample_prompts: give a text file with a prompt to a line")
        return []
    requests = read_prompts(preview.sample_prompts, preview_defaults(variant))
    for flag, value in (("--vae", settings.vae.vae), ("--t5", settings.text.t5)):
        if not value:
            raise InputError(f"previews need {flag}: give it, or leave out --sample_prompts")
    check_vae(settings.vae.vae)
    check_text_encoder(settings.text.t5, settings.text.tokenizer or "auto")
    return requests


def build(settings: TrainSettings, plan: Plan, dataset: CachedDataset, accelerator: Accelerator, seed: int) -> Run:
    """Everything that the loop needs, each model loaded when it is its turn."""
    batches = EpochBatches(dataset, seed=seed, rank=accelerator.process_index, num_ranks=accelerator.num_processes)
    length = run_length(len(batches), settings)
    log.info(summarise(dataset))
    warmup = warmup_steps(settings.optimizer.lr_warmup_steps, length.steps)
    previewer = make_previewer(settings, plan, accelerator, seed) if accelerator.is_main_process else None
    dtype = None if accelerator.mixed_precision == "no" else dtype_of(accelerator.mixed_precision)
    log.info("loading %s%s", settings.dit.dit, f" in {name_of(dtype)}" if dtype else "")
    model = assemble_dit(
        model_settings(settings), device=accelerator.device, dtype=dtype, computing=None if dtype else torch.float32
    )
    adapter = attach_adapter(model, settings.network, seed=seed, device=accelerator.device)
    finish_dit(model, model_settings(settings), accelerator.device)
    log.info(adapter.describe())
    optimizer = make_optimizer(adapter.parameter_groups(settings.optimizer.learning_rate), settings.optimizer)
    facts = RunFacts(
        seed=seed,
        num_items=dataset.num_items,
        batches_per_epoch=len(batches),
        num_epochs=length.epochs,
        max_steps=length.steps,
        warmup=warmup,
        mixed_precision=accelerator.mixed_precision,
        datasets=metadata(dataset, plan.configs),
        started_at=time.time(),
        session_id=random.SystemRandom().randrange(2**32),
    )
    model.train()
    return Run(
        settings=settings,
        accelerator=accelerator,
        dit=model,
        model=prepare_model(model, accelerator),
        adapter=adapter,
        optimizer=accelerator.prepare_optimizer(optimizer),
        schedule=make_schedule(optimizer, settings.optimizer, total=length.steps),
        batches=batches,
        loader=make_loader(dataset, batches, settings.loop, accelerator.device),
        length=length,
        seed=seed,
        metadata=training_metadata(settings, facts, adapter.metadata()),
        previewer=previewer,
        writer=MetricsWriter(settings.logs, settings.save) if accelerator.is_main_process else None,
    )


def make_loader(
    dataset: CachedDataset, batches: EpochBatches, loop: LoopSettings, device: torch.device
) -> DataLoader[Batch]:
    """The loader of one process's batches."""
    workers = min(loop.max_data_loader_n_workers, os.cpu_count() or 1, len(batches))
    return DataLoader(
        cast("Dataset[Batch]", dataset),  # samples go in and, by the collation, batches come out
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=loop.persistent_data_loader_workers and workers > 0,
        pin_memory=device.type == "cuda",
    )


def make_previewer(settings: TrainSettings, plan: Plan, accelerator: Accelerator, seed: int) -> Previewer | None:
    """The previewer, its prompts encoded and the text encoder gone again; None where no previews are asked for."""
    if not plan.requests:
        return None
    conditions = encode_prompts(plan.requests, settings.text, accelerator.device)
    vae = open_vae(settings.vae, accelerator.device)
    vae.to("cpu")
    return Previewer(plan.requests, conditions, vae, accelerator.device, settings.save, plan.variant.fps, seed)
