"""Estimate the memory of a training run from file headers and one batch, and check that it is available."""

import os
from dataclasses import replace

import torch
from torch import Tensor, nn

from dataset.batching.batches import Batch, Bucket, CachedDataset, collate
from networks.adapter import trains_weights
from wan_train.log import get_logger
from wan_train.models.variants import VARIANTS
from wan_train.plan import (
    META,
    Bytes,
    Needs,
    Outline,
    Way,
    check_fits,
    free_memory,
    largest_first,
    outlined,
    size,
)
from wan_train.training.accelerator import launched_device, launched_dtype
from wan_train.training.experts.models import model_settings
from wan_train.training.experts.plan import ExpertPlan, settings_of
from wan_train.training.objective.conditioning import conditions_of
from wan_train.training.objective.loss import Draws, measure
from wan_train.training.objective.target import target_of
from wan_train.training.optimizing.state_bytes import states_of
from wan_train.training.optimizing.stepping import needs_parts, parts_of
from wan_train.training.settings import TrainSettings

log = get_logger(__name__)


def check_needs(settings: TrainSettings, experts: ExpertPlan, dataset: CachedDataset) -> None:
    """Log the memory that a run needs, and raise InputError if it does not fit.

    For a LoRA only GPUs are checked.
    """
    device, whole = launched_device(), trains_weights(settings.network)
    if not whole and device.type != "cuda":
        return
    batch = largest_batch(dataset)
    each = [needs_of(settings_of(settings, expert), batch) for expert in experts.trained or (None,)]
    needs = each[0] if len(each) == 1 else needs_of_pair(each[0], each[1], settings)
    log.info("%s %s", "full fine-tuning" if whole else "training", needs.describe())
    check_fits(needs, free_memory(device), ways_out(settings, needs), device_name=str(device))


def needs_of(settings: TrainSettings, batch: Batch) -> Needs:
    """Estimate the memory of training one model on this batch."""
    outline = outlined_for(settings)
    trained = dict(outline.adapter.named_parameters())
    fused, whole = settings.optimizer.fused_backward_pass, trains_weights(settings.network)
    parts = [part.parameters for part in parts_of(trained, {})]
    outline.passes(lambda model: loss_of(model, settings, batch, META), parts if fused else [list(trained.values())])
    gradients = [sum(size(parameter) for parameter in part) for part in parts]
    states = states_of(list(trained.values()), settings.optimizer)
    away, exchanged = settings.optimizer.optimizer_cpu_offload, 0
    step = states.step + (states.at_hand if away else 0)
    if not (whole or needs_parts(settings)):
        step = max(step, sum(gradients))  # all weights are stepped at once, with a temporary copy of each
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not (fused or settings.processes.ddp_gradient_as_bucket_view):
        exchanged = sum(gradients)  # data-parallel training keeps a copy of all gradients
    passes = outline.ledger.peak
    if settings.loop.gradient_accumulation_steps > 1 or settings.prior.prior_captions is not None:
        passes = max(passes, outline.activations.device + sum(gradients))  # of the previous pass
    added = 0 if whole else sum(map(size, trained.values()))
    return Needs(
        weights=outline.weights + Bytes(-added),
        adapter=Bytes(added),
        gradients=Bytes(max(gradients) if fused else sum(gradients) + exchanged),
        states=Bytes(0, states.kept) if away else Bytes(states.kept),
        ema=ema_of(trained, settings, outline),
        activations=outline.activations,
        peak=exchanged + max(passes, 0 if fused else sum(gradients) + step) + (step if fused else 0),
    )


def outlined_for(settings: TrainSettings) -> Outline:
    """Return the outline of the model as `make_model` loads it."""
    dtype = launched_dtype(settings.loop)
    plain = dtype == torch.float32
    return outlined(
        model_settings(settings),
        settings.network,
        dtype=None if plain else dtype,
        computing=torch.float32 if plain else None,
    )


def needs_of_pair(high: Needs, low: Needs, settings: TrainSettings) -> Needs:
    """Combine the needs of two experts that are trained in turns.

    A parked expert has its frozen weights in CPU RAM, and leaves a copy there while it is on the device. A shared
    adapter exists once.
    """
    both = high.alternating_with(low)
    if settings.experts.offload_inactive_dit:
        weights = Bytes(max(high.weights.device, low.weights.device), both.weights.device + both.weights.host)
        both = replace(both, weights=weights)
    if settings.experts.shared_lora:
        both = replace(both, adapter=high.adapter, states=high.states, ema=high.ema)
    return both


def loss_of(model: nn.Module, settings: TrainSettings, batch: Batch, device: torch.device) -> Tensor:
    """Compute the training loss of a batch; `device` may be meta."""
    latents = target_of(batch).latents.to(device)
    draws = Draws(torch.ones(len(latents), device=device), torch.zeros_like(latents, dtype=torch.float32), None)
    # On the CPU: camera maps are computed from values.
    conditions = conditions_of(batch, VARIANTS[settings.dit.task], torch.device("cpu")).to(device)
    return measure(model, latents, conditions, draws, settings=settings.loss).mean


def ema_of(trained: dict[str, nn.Parameter], settings: TrainSettings, outline: Outline) -> Bytes:
    """Return the memory of the EMA in float32. The EMA of streamed weights is in CPU RAM with them."""
    if settings.loop.ema_decay is None:
        return Bytes()
    away = set(trained) if settings.loop.ema_cpu else outline.stream.names(outline.model)
    every = {name: 4 * parameter.numel() for name, parameter in trained.items()}
    host = sum(count for name, count in every.items() if name in away)
    return Bytes(sum(every.values()) - host, host)


def largest_batch(dataset: CachedDataset) -> Batch:
    """Return the batch with the most tokens."""

    def positions(bucket: Bucket) -> list[int]:
        return dataset.buckets[bucket][: dataset.configs[bucket.dataset].batch_size]

    def tokens(bucket: Bucket) -> int:
        return len(positions(bucket)) * dataset[positions(bucket)[0]].latents[0].numel()

    return collate([dataset[position] for position in positions(max(dataset.buckets, key=tokens))])


def ways_out(settings: TrainSettings, needs: Needs) -> list[str]:
    """Return the options that would save memory and are not given yet, those for the largest part first."""
    ways = _ways_of_weights(settings, needs) if trains_weights(settings.network) else _ways_of_lora(settings, needs)
    activations = settings.activations
    ways += [
        Way("--gradient_checkpointing", needs.activations, activations.recompute != "none"),
        Way("--gradient_checkpointing_cpu_offload", needs.activations, activations.gradient_checkpointing_cpu_offload),
        Way("--ffn_chunks", needs.activations, activations.ffn_chunks > 1),
        Way("--optimizer_cpu_offload", needs.states, settings.optimizer.optimizer_cpu_offload),
        Way("--ema_cpu", needs.ema, settings.loop.ema_cpu or settings.loop.ema_decay is None),
    ]
    return largest_first(ways)


def _ways_of_weights(settings: TrainSettings, needs: Needs) -> list[Way]:
    """Return the options for full fine-tuning."""
    is_small = settings.optimizer.optimizer_type.lower() in ("adamw8bitsr", "adafactor", "adamw8bit")
    return [
        Way("--full_bf16", needs.weights, settings.network.full_bf16),
        Way("--optimizer_type AdamW8bitSR or Adafactor", needs.states, is_small),
        Way("--fused_backward_pass", needs.gradients, settings.optimizer.fused_backward_pass),
        Way("--blocks_to_swap", needs.weights, settings.stream.blocks_to_swap > 0),
        Way("--trainable", needs.gradients, bool(settings.network.trainable)),
    ]


def _ways_of_lora(settings: TrainSettings, needs: Needs) -> list[Way]:
    """Return the options for a LoRA, whose frozen model may be stored in 8 bits."""
    weights, parked = settings.weights, settings.experts.offload_inactive_dit
    streamed = settings.stream.blocks_to_swap > 0
    is_small = "8bit" in settings.optimizer.optimizer_type.lower() or settings.optimizer.optimizer_type == "Adafactor"
    ways = [
        Way("--fp8_base --fp8_scaled", needs.weights, weights.fp8_base or weights.int8_base),
        Way("--blocks_to_swap", needs.weights, streamed or parked),
        Way("--optimizer_type AdamW8bit", needs.states, is_small),
        Way("a smaller --network_dim", needs.adapter + needs.states),
    ]
    if settings.dit.dit and settings.experts.dit_high_noise:
        ways.append(Way("--offload_inactive_dit", needs.weights, parked or streamed))
    return ways
