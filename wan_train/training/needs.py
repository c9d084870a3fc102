"""Estimate the memory of full fine-tuning from file headers and one batch, and check that it is available."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from dataset.batching.batches import Batch, Bucket, CachedDataset, collate
from wan_train.log import get_logger
from wan_train.models.variants import VARIANTS
from wan_train.placement.ledger import WORK, Ledger
from wan_train.plan import META, Bytes, Needs, Outline, check_fits, outlined, size
from wan_train.training.accelerator import launched_device, launched_dtype
from wan_train.training.experts.models import model_settings
from wan_train.training.experts.plan import ExpertPlan, settings_of
from wan_train.training.objective.conditioning import conditions_of
from wan_train.training.objective.loss import Draws, measure
from wan_train.training.objective.target import target_of
from wan_train.training.optimizing.optimizer_state import for_training
from wan_train.training.optimizing.optimizers import check_optimizer
from wan_train.training.optimizing.stepping import parts_of
from wan_train.training.settings import OptimizerSettings, TrainSettings

log = get_logger(__name__)

_SMALL = 128  # rows and columns of the weight that an optimizer is tried on
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def check_needs(settings: TrainSettings, experts: ExpertPlan, dataset: CachedDataset) -> None:
    """Log the memory that full fine-tuning needs, and raise InputError if it does not fit."""
    batch = largest_batch(dataset)
    each = [needs_of(settings_of(settings, expert), batch) for expert in experts.trained or (None,)]
    needs = each[0] if len(each) == 1 else each[0].alternating_with(each[1])
    log.info("full fine-tuning %s", needs.describe())
    device = launched_device()
    check_fits(needs, free_memory(device), ways_out(settings), device_name=str(device))


def needs_of(settings: TrainSettings, batch: Batch) -> Needs:
    """Estimate the memory of training one model on this batch."""
    dtype = launched_dtype(settings.loop)
    plain = dtype == torch.float32
    outline = outlined(
        model_settings(settings),
        settings.network,
        dtype=None if plain else dtype,
        computing=torch.float32 if plain else None,
    )
    trained = dict(outline.adapter.named_parameters())
    fused = settings.optimizer.fused_backward_pass
    parts = [part.parameters for part in parts_of(trained, {})]
    outline.passes(lambda model: loss_of(model, settings, batch, META), parts if fused else [list(trained.values())])
    gradients = [sum(size(parameter) for parameter in part) for part in parts]
    states = states_of(list(trained.values()), settings.optimizer)
    away, exchanged = settings.optimizer.optimizer_cpu_offload, 0
    step = states.step + (states.at_hand if away else 0)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not (fused or settings.processes.ddp_gradient_as_bucket_view):
        exchanged = sum(gradients)  # data-parallel training keeps a copy of all gradients
    return Needs(
        weights=outline.weights,
        gradients=Bytes(max(gradients) if fused else sum(gradients) + exchanged),
        states=Bytes(0, states.kept) if away else Bytes(states.kept),
        ema=ema_of(trained, settings, outline),
        activations=outline.activations,
        peak=exchanged + max(outline.ledger.peak, 0 if fused else sum(gradients) + step) + (step if fused else 0),
    )


def loss_of(model: nn.Module, settings: TrainSettings, batch: Batch, device: torch.device) -> Tensor:
    """Compute the training loss of a batch; `device` may be meta."""
    latents = target_of(batch).latents.to(device)
    draws = Draws(torch.ones(len(latents), device=device), torch.zeros_like(latents, dtype=torch.float32), None)
    # On the CPU: camera maps are computed from values.
    conditions = conditions_of(batch, VARIANTS[settings.dit.task], torch.device("cpu")).to(device)
    return measure(model, latents, conditions, draws, settings=settings.loss).mean


@dataclass(frozen=True)
class StateBytes:
    """Bytes of an optimizer's states after its first step, the peak of temporary memory in the step of one weight, and
    the peak of states on the device at once when they are kept in CPU RAM."""

    kept: int
    step: int
    at_hand: int


def states_of(trained: Iterable[nn.Parameter], settings: OptimizerSettings) -> StateBytes:
    """Estimate the memory of the optimizer's states for these weights.

    Weights in bfloat16 are stepped in float32. An optimizer that cannot run on the meta device is tried on a small
    weight; its states are assumed to scale with the weights, and the temporary memory of its step is unknown and
    reported as 0.
    """
    kind, arguments = check_optimizer(settings)
    weights = [nn.Parameter(torch.empty(p.shape, device=META, dtype=torch.float32)) for p in trained]
    widest = max(weights, key=torch.numel)
    try:
        every = tried(kind, weights, arguments)
        each = [state_bytes(every.state[weight]) for weight in weights]
        kept = state_bytes(every.state)
        alone = tried(kind, [widest], arguments)
        ledger = Ledger()
        with ledger:
            stand_in = torch.empty_like(widest)
            take_step(alone, [widest])
        del stand_in
    except Exception:  # any error of an optimizer that reads values
        small = nn.Parameter(torch.ones(_SMALL, _SMALL))
        for_each = state_bytes(tried(kind, [small], arguments).state) / small.numel()
        each = [round(for_each * weight.numel()) for weight in weights]
        return StateBytes(round(for_each * sum(map(torch.numel, weights))), 0, most_at_hand(each))
    return StateBytes(kept, ledger.most[WORK], most_at_hand(each))


def most_at_hand(each: list[int]) -> int:
    """Return the peak bytes of the states of three consecutive weights: the one being stepped, the previous one on its
    way to CPU RAM, and the next one being fetched. See `HostStates`."""
    return max(sum(each[place : place + 3]) for place in range(max(1, len(each) - 2)))


def tried(optimizer_class: Any, weights: list[nn.Parameter], arguments: dict[str, Any]) -> torch.optim.Optimizer:
    """Return an optimizer after its first step."""
    optimizer: torch.optim.Optimizer = optimizer_class([{"params": weights}], **arguments)
    for_training(optimizer)
    take_step(optimizer, weights)
    return optimizer


def state_bytes(states: Mapping[Any, Any]) -> int:
    """Return the bytes of all tensors in the states of one weight, or of all weights."""
    kept = {tensor.untyped_storage()._cdata: size(tensor) for tensor in tensors_in(list(states.values()))}
    return sum(kept.values())


def take_step(optimizer: torch.optim.Optimizer, weights: Iterable[nn.Parameter]) -> None:
    """Take a step with arbitrary gradients; for bitsandbytes, whose kernels need real data, only create the states."""
    weights = list(weights)
    if callable(getattr(optimizer, "init_state", None)):
        for place, weight in enumerate(weights):
            if not optimizer.state[weight]:
                optimizer.init_state(optimizer.param_groups[0], weight, 0, place)  # type: ignore[attr-defined]
        return
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    optimizer.step()
    for weight in weights:
        weight.grad = None


def tensors_in(value: object) -> Iterable[Tensor]:
    """Yield all tensors in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif not isinstance(value, str) and isinstance(value, Iterable):
        for member in value:
            yield from tensors_in(member)


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


def free_memory(device: torch.device) -> Bytes:
    """Return the free memory of a device, and this process's share of the free CPU RAM."""
    host = psutil.virtual_memory().available
    try:
        limit = _CGROUP.read_text().strip()
    except OSError:
        limit = "max"
    if limit.isdigit():
        host = min(host, int(limit) - psutil.Process().memory_info().rss)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Bytes(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0, host // sharing)


def ways_out(settings: TrainSettings) -> list[str]:
    """Return the options that would save memory and are not given yet."""
    eight = "--optimizer_type AdamW8bitSR or Adafactor"
    ways = {
        "--full_bf16": settings.network.full_bf16,
        eight: settings.optimizer.optimizer_type.lower() in ("adamw8bitsr", "adafactor", "adamw8bit"),
        "--fused_backward_pass": settings.optimizer.fused_backward_pass,
        "--gradient_checkpointing": settings.activations.recompute != "none",
        "--gradient_checkpointing_cpu_offload": settings.activations.gradient_checkpointing_cpu_offload,
        "--ema_cpu": settings.loop.ema_cpu or settings.loop.ema_decay is None,
        "--optimizer_cpu_offload": settings.optimizer.optimizer_cpu_offload,
        "--blocks_to_swap": settings.stream.blocks_to_swap,
        "--trainable": settings.network.trainable,
    }
    return [way for way, given in ways.items() if not given]
