"""Build the parts of a run in order, and restore their state when resuming."""

import os
import time
from typing import cast

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from dataset.batching.batches import Batch, CachedDataset, collate
from dataset.batching.epochs import EpochBatches
from dataset.summary import metadata, summarise
from networks.adapter import Adapter
from wan_train.conditions.conditions import Conditions
from wan_train.distributed.ranks import first_machine_share
from wan_train.log import get_logger
from wan_train.models.dit.experts import pair_of
from wan_train.models.variants import VARIANTS
from wan_train.placement.lanes import lane_from_host
from wan_train.placement.transfers import can_pin, pinned
from wan_train.profiling.profiler import Profiler
from wan_train.remote.mirror import Mirror
from wan_train.sampling.decode import open_vae
from wan_train.sampling.encode import encode_clip_requests, encode_images, encode_texts
from wan_train.training.accelerator import from_first, prepare_model
from wan_train.training.carried import Length, RunningMean, Skipped, Stateful
from wan_train.training.evaluating.validation import Data, Validator
from wan_train.training.experts.models import TrainedModel, make_models
from wan_train.training.experts.pair import PairEma, parts_of
from wan_train.training.experts.plan import ExpertPlan
from wan_train.training.loop import run_length
from wan_train.training.objective.conditioning import dropping_rates
from wan_train.training.objective.objective import Objective
from wan_train.training.objective.prior import Prior
from wan_train.training.objective.strata import Strata
from wan_train.training.optimizing.ema import Ema
from wan_train.training.optimizing.optimization import Optimization
from wan_train.training.optimizing.optimizer_state import Portable
from wan_train.training.optimizing.schedules import check_schedule, make_schedule, warmup_steps
from wan_train.training.optimizing.stepping import Stepping, make_stepping
from wan_train.training.preflight import RunPlan
from wan_train.training.reporting.metrics import MetricsWriter
from wan_train.training.reporting.preview import Previewer
from wan_train.training.run import Reporting, Run, TrainingData
from wan_train.training.saving.hub import open_hub
from wan_train.training.saving.identity import Identity
from wan_train.training.saving.metadata import RunFacts, training_metadata
from wan_train.training.saving.resume import Trained, begin, restore
from wan_train.training.saving.save import Saving
from wan_train.training.saving.state import State
from wan_train.training.settings import LoopSettings, TrainSettings
from wan_train.training.stopping import leave_signals_to_trainer

log = get_logger(__name__)


def build(
    settings: TrainSettings, plan: RunPlan, data: Data, accelerator: Accelerator, seed: int, *, mirror: Mirror | None
) -> Run:
    """Build everything that the training loop needs."""
    dataset, is_first = data.training, accelerator.is_main_process
    batches = EpochBatches(dataset, seed=seed, rank=accelerator.process_index, num_ranks=accelerator.num_processes)
    length = run_length(len(batches), settings.loop)
    check_schedule(settings.optimizer, length.steps)
    trained = Trained(plan.configs, dataset.keys, plan.prior_captions, length.steps, accelerator.mixed_precision)
    began = begin(settings, plan.state, trained, dataset, length, accelerator)
    log.info(summarise(dataset))
    texts = encode(settings, plan, accelerator)
    previewer = make_previewer(settings, plan, texts, accelerator, seed)
    dit, adapter, streams = make_models(settings, plan.experts, accelerator, seed)
    warmup = warmup_steps(settings.optimizer.lr_warmup_steps, length.steps)
    stepping = make_stepping(adapter, streams, settings, accelerator, warmup=warmup, seed=seed)
    optimizing = make_optimization(settings, adapter, stepping, accelerator, length)
    validator = make_validator(settings, data, plan.experts)
    carried = carried_of(optimizing, accelerator, validator)
    if plan.state is not None:
        restore(plan.state, dict(adapter.named_parameters()), carried)
    facts = make_facts(plan, dataset, accelerator, length, began.identity, seed=seed, warmup=warmup)
    rows = training_metadata(settings, facts, adapter.metadata())
    dit.train()
    wrapped = dit if stepping.fused is not None else prepare_model(dit, accelerator)
    model = TrainedModel(accelerator, dit, wrapped, adapter, plan.experts)
    loader = make_loader(dataset, batches, settings.loop, accelerator.device)
    fed = TrainingData(batches, loader, settings.loop.gradient_accumulation_steps, length, began.position)
    writer = make_writer(settings, plan.state, rows) if is_first else None
    saving = Saving(
        settings=settings,
        seed=seed,
        identity=began.identity,
        is_resumed=began.position.step > 0,
        epoch_steps=fed.epoch_steps,
        metadata=rows,
        configuration=began.configuration,
        samples=began.samples,
        carried=carried,
        hub=open_hub(settings.hub, background=accelerator.num_processes > 1) if is_first else None,
        mirror=mirror,
    )
    objective = make_objective(settings, plan, dataset, texts, seed=seed, device=accelerator.device)
    reporting = Reporting(settings.preview, previewer, writer, mirror)
    profiler = Profiler(settings.profile.profile if is_first else None, settings.save.output_name)
    return Run(model, optimizing, objective, fed, saving, reporting, validator, profiler)


def make_optimization(
    settings: TrainSettings, adapter: Adapter, stepping: Stepping, accelerator: Accelerator, length: Length
) -> Optimization:
    """Create the optimizer, schedule, EMA and step limits."""
    return Optimization(
        optimizer=accelerator.prepare_optimizer(stepping.optimizer),
        stepping=stepping,
        schedule=make_schedule(stepping.optimizer, settings.optimizer, total=length.steps),
        ema=make_ema(adapter, settings.loop, accelerator.device),
        average=RunningMean(),
        skipped=Skipped(),
        max_grad_norm=settings.loop.max_grad_norm,
        skip_nonfinite=settings.loop.skip_nonfinite,
        scale_weight_norms=settings.network.scale_weight_norms,
    )


def carried_of(optimizing: Optimization, accelerator: Accelerator, validator: Validator | None) -> dict[str, Stateful]:
    """Return all parts that carry state from one step to the next, by their names in a saved state."""
    every: dict[str, Stateful | None] = {
        "optimizer": Portable(optimizing.optimizer),
        "schedule": Portable(optimizing.schedule),
        "average": optimizing.average,
        "skipped": optimizing.skipped,
        "scaler": accelerator.scaler,
        "ema": optimizing.ema,
        "validator": validator,
    }
    return {name: part for name, part in every.items() if part is not None}


def make_objective(
    settings: TrainSettings,
    plan: RunPlan,
    dataset: CachedDataset,
    texts: dict[str, Conditions],
    *,
    seed: int,
    device: torch.device,
) -> Objective:
    """Create the training objective of a run on `device`."""
    variant = VARIANTS[settings.dit.task]
    return Objective(
        seed=seed,
        timesteps=settings.timesteps,
        loss=settings.loss,
        variant=variant,
        rates=dropping_rates(settings.images, variant),
        strata=make_strata(settings, dataset, seed),
        prior=make_prior(settings, plan, texts, device),
    )


def make_ema(adapter: Adapter, loop: LoopSettings, device: torch.device) -> Ema | PairEma | None:
    """Create the EMA of the trained parameters, one for each of two experts; None if it is not requested."""
    if loop.ema_decay is None:
        return None
    lane = lane_from_host(device) if loop.ema_cpu else None
    parts = {
        expert: Ema(dict(part.named_parameters()), loop.ema_decay, lane=lane) for expert, part in parts_of(adapter)
    }
    return parts[None] if None in parts else PairEma(pair_of({str(expert): part for expert, part in parts.items()}))


def make_validator(settings: TrainSettings, data: Data, experts: ExpertPlan) -> Validator | None:
    """Create the validator; None if nothing is held out."""
    if data.held_out is None:
        return None
    variant = VARIANTS[settings.dit.task]
    rate = dropping_rates(settings.images, variant).images if variant.is_fused else None
    parts = settings.validation, settings.timesteps, settings.loss
    return Validator(data.held_out, *parts, experts, variant=variant, without_images=rate)


def make_strata(settings: TrainSettings, dataset: CachedDataset, seed: int) -> Strata | None:
    """Create the strata of noise levels; None if levels are drawn independently."""
    count = settings.timesteps.num_timestep_buckets
    return None if count is None else Strata(dataset, count, seed=seed)


def make_facts(
    plan: RunPlan,
    dataset: CachedDataset,
    accelerator: Accelerator,
    length: Length,
    identity: Identity,
    *,
    seed: int,
    warmup: int,
) -> RunFacts:
    """Collect the facts of the run that go into the metadata."""
    return RunFacts(
        seed=seed,
        num_items=dataset.num_items,
        batches_per_epoch=len(EpochBatches(dataset, seed=seed, num_ranks=accelerator.num_processes)),
        num_epochs=length.epochs,
        max_steps=length.steps,
        warmup=warmup,
        mixed_precision=accelerator.mixed_precision,
        datasets=metadata(dataset, plan.configs),
        started_at=time.time(),
        session_id=identity.session,
    )


def make_loader(
    dataset: CachedDataset, batches: EpochBatches, loop: LoopSettings, device: torch.device
) -> DataLoader[Batch]:
    """Create the data loader of this process."""
    workers = min(loop.max_data_loader_n_workers, os.cpu_count() or 1, len(batches))
    return DataLoader(
        cast("Dataset[Batch]", dataset),  # yields samples, which collate_fn turns into batches
        batch_sampler=batches,
        collate_fn=collate,
        worker_init_fn=leave_signals_to_trainer,
        num_workers=workers,
        persistent_workers=loop.persistent_data_loader_workers and workers > 0,
        pin_memory=can_pin(device),
    )


def make_writer(settings: TrainSettings, state: State | None, rows: dict[str, str]) -> MetricsWriter:
    """Create the writer of metrics. When resuming, rows up to the state's step are kept."""
    keep_until = None if state is None else state.position.step
    return MetricsWriter(settings.logs, settings.save, keep_until=keep_until, config=rows)


def encode(settings: TrainSettings, plan: RunPlan, accelerator: Accelerator) -> dict[str, Conditions]:
    """Encode the texts of the prior and of previews on the first process, send them to all, and free the text
    encoder."""
    texts = list(plan.prior_captions)
    texts += [text for request in plan.requests for text in (request.prompt, request.negative_prompt)]
    if not texts:
        return {}
    encoded = encode_texts(texts, settings.text, accelerator.device) if accelerator.is_main_process else {}
    return {text: from_first(encoded.get(text)) for text in dict.fromkeys(texts)}


def make_previewer(
    settings: TrainSettings, plan: RunPlan, texts: dict[str, Conditions], accelerator: Accelerator, seed: int
) -> Previewer | None:
    """Create the previewer of this process's share of the previews; None if it has none."""
    requests = dict(first_machine_share(list(enumerate(plan.requests))))
    if not requests:
        return None
    device = accelerator.device
    seen = encode_clip_requests(list(requests.values()), settings.image, device)
    vae = open_vae(settings.vae, device)
    images = {
        index: encode_images(request, vae, tokens, device)
        for (index, request), tokens in zip(requests.items(), seen, strict=True)
    }
    vae.to("cpu")
    return Previewer(requests, texts, images, vae, device, settings.save, plan.variant.fps, seed)


def make_prior(
    settings: TrainSettings, plan: RunPlan, texts: dict[str, Conditions], device: torch.device
) -> Prior | None:
    """Create prior preservation on `device`; None if it is not requested."""
    if not plan.prior_captions:
        return None
    rows = [pinned(texts[caption].context[0], device) for caption in plan.prior_captions]
    return Prior(rows, settings.prior.prior_loss_weight)
