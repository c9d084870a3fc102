"""Take one optimizer step over a window of batches."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from dataset.batching.batches import Batch
from networks.adapter import Adapter
from wan_train.errors import RunError
from wan_train.flow.keyed import seed_of
from wan_train.log import get_logger
from wan_train.training.experts.models import TrainedModel
from wan_train.training.experts.pair import PairAdapter, PairModel
from wan_train.training.experts.plan import ExpertPlan
from wan_train.training.objective.loss import Draws, Losses, measure
from wan_train.training.objective.objective import Objective
from wan_train.training.objective.prior import prior_loss
from wan_train.training.objective.target import Target, target_of
from wan_train.training.optimizing.optimization import Optimization
from wan_train.training.optimizing.optimizer_state import learning_rates
from wan_train.training.reporting.metrics import StepMetrics, loss_by_stratum, num_tokens, peak_memory_mib
from wan_train.training.saving.state import Position
from wan_train.training.stopping import StopRequest

log = get_logger(__name__)

NORM_EVERY = 20  # steps between measurements of the adapter's norm, which synchronise with the device


@dataclass(frozen=True)
class Shared:
    """Values of a step gathered from all processes: the mean loss, t and loss (N,) of each sample, and the signal
    received by any of them, or 0."""

    loss: float
    t: Tensor
    samples: Tensor
    signal: int


@dataclass(frozen=True)
class Drawn:
    """A batch with its target, noise and noise levels, and the expert that it trains, if there are two."""

    batch: Batch
    target: Target
    draws: Draws
    expert: str | None = None


def with_draws(
    batches: Iterable[Batch],
    position: Position,
    *,
    objective: Objective,
    experts: ExpertPlan,
    batches_per_step: int,
) -> Iterator[Drawn]:
    """Yield the batches that follow a position, each with noise and noise levels keyed by its samples."""
    for index, batch in enumerate(batches):
        expert = experts.at(position.step + 1 + index // batches_per_step)
        limits = experts.limits(expert, objective.timesteps)
        target = target_of(batch)
        yield Drawn(batch, target, objective.draw(batch, target, position.epoch, limits), expert)


def take_step(
    window: list[Drawn],
    position: Position,
    *,
    model: TrainedModel,
    optimizing: Optimization,
    objective: Objective,
    stop: StopRequest,
) -> tuple[StepMetrics, int]:
    """Take the step; return its metrics and the signal that asks to stop after it, or 0. Raise RunError if the loss or
    gradient is NaN or Inf too often."""
    began, expert = time.perf_counter(), window[0].expert
    means, samples = [], []
    for index, drawn in enumerate(window):
        losses = accumulate_gradients(
            drawn,
            position.epoch,
            model=model,
            optimizing=optimizing,
            objective=objective,
            share=1 / len(window),
            last=index + 1 == len(window),
        )
        means.append(losses.mean)
        samples.append(losses.samples)
    levels = torch.cat([drawn.draws.t for drawn in window])
    mean = torch.stack(means).mean()
    shared = share(model.accelerator, mean, t=levels, samples=torch.cat(samples), signal=stop.signal)
    clear_idle_gradients(model.adapter, expert)
    norm = clip(model, optimizing)
    if math.isfinite(shared.loss) and math.isfinite(norm):
        update(model.adapter, optimizing, expert)
    else:
        skip_nonfinite_step(model, optimizing, loss=shared.loss, norm=norm, position=position, window=window)
    rates = learning_rates(optimizing.optimizer)
    for parameter in model.trained.values():
        parameter.grad = None
    optimizing.schedule.step()
    seconds = time.perf_counter() - began
    average, finite = optimizing.average, shared.samples.isfinite()
    tokens = sum(num_tokens(drawn.target.latents.shape) for drawn in window)
    metrics = StepMetrics(
        step=position.step,
        epoch=position.epoch,
        loss=shared.loss,
        loss_average=average.add(shared.loss) if math.isfinite(shared.loss) else average.mean,
        lr=next(iter(rates.values())),
        grad_norm=norm,
        seconds=seconds,
        memory_mib=peak_memory_mib(model.device),
        adapter_norm=model.adapter.norm() if position.step % NORM_EVERY == 0 else None,
        tokens_per_second=tokens * model.num_processes / seconds,
        strata=loss_by_stratum(shared.t[finite], shared.samples[finite]),
        learning_rates=rates if len(rates) > 1 else {},
        expert=expert if model.experts.is_pair else None,
    )
    return metrics, shared.signal


def accumulate_gradients(
    drawn: Drawn,
    epoch: int,
    *,
    model: TrainedModel,
    optimizing: Optimization,
    objective: Objective,
    share: float,
    last: bool,
) -> Losses:
    """Run the forward and backward pass of a batch, adding its gradient times `share`; return the detached losses. With
    `last`, processes synchronise gradients."""
    batch, device, accelerator = drawn.batch, model.device, model.accelerator
    if isinstance(model.dit, PairModel):
        model.dit.of(str(drawn.expert))
    target, placed = drawn.target.to(device), drawn.draws.to(device)
    conditions = objective.conditions(batch, epoch, device)
    seed_dropout(objective.seed, epoch, batch, device)
    prior = None if batch.is_reg else objective.prior
    with model.exchange(now=last and prior is None):
        losses = measure(
            model.wrapped, target.latents, conditions, placed, weights=target.weights, settings=objective.loss
        )
        if optimizing.stepping.fused is None or is_finite_everywhere(accelerator, losses.mean):
            accelerator.backward(losses.mean * (share * batch.loss_weight))
    mean = losses.mean.detach() * batch.loss_weight
    if prior is not None:
        texts = prior.choose(batch.keys, seed=objective.seed, epoch=epoch)
        kept = conditions.with_context([rows.to(device) for rows in texts])
        with model.exchange(now=last):
            loss = prior_loss(model.wrapped, model.dit, model.adapter, target.latents, kept, placed) * prior.weight
            accelerator.backward(loss * share)
        mean = mean + loss.detach()
    return Losses(mean, losses.samples)


def is_finite_everywhere(accelerator: Accelerator, loss: Tensor) -> bool:
    """Return whether the loss of every process is finite. A fused backward pass needs to know this beforehand."""
    return bool(accelerator.gather(loss.detach().unsqueeze(0)).isfinite().all())


def clear_idle_gradients(adapter: Adapter, expert: str | None) -> None:
    """Remove the zero gradients of the inactive expert, so that the optimizer skips its parameters."""
    if isinstance(adapter, PairAdapter):
        for other, _ in adapter.parts.items():
            for parameter in adapter.parameters_of(other) if other != expert else ():
                parameter.grad = None


def seed_dropout(seed: int, epoch: int, batch: Batch, device: torch.device) -> None:
    """Seed the model's random draws for this batch by the run's seed, the epoch and the samples alone."""
    names = "/".join(f"{key.item} {key.repeat}" for key in batch.keys)
    number = seed_of(f"{seed}/{epoch}/{names}/dropout")
    # Not torch.manual_seed: before CUDA is initialized it formats the call stack, which takes half a millisecond.
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


def share(accelerator: Accelerator, loss: Tensor, *, t: Tensor, samples: Tensor, signal: int) -> Shared:
    """Gather what processes need to agree on; the mean loss and the stop signal take one exchange."""
    local = torch.stack([loss.float(), torch.tensor(float(signal), device=loss.device)])
    rows = accelerator.gather(local.unsqueeze(0)).cpu().double()
    return Shared(float(rows[:, 0].mean()), t.cpu(), samples.detach().cpu(), int(rows[:, 1].max()))


def clip(model: TrainedModel, optimizing: Optimization) -> float:
    """Clip the gradient and return its norm before clipping; a fused backward pass has clipped already, and only
    returns the norm."""
    if optimizing.stepping.fused is not None:
        return optimizing.stepping.fused.finish()
    limit = optimizing.max_grad_norm or math.inf
    return float(model.accelerator.clip_grad_norm_(list(model.trained.values()), limit))


def update(adapter: Adapter, optimizing: Optimization, expert: str | None) -> None:
    """Step the optimizer, scale weight norms and update the EMA of the active expert."""
    optimizing.optimizer.step()
    optimizing.stepping.settle()
    if optimizing.scale_weight_norms is not None:
        adapter.scale_norms(optimizing.scale_weight_norms)
    if optimizing.ema is not None:
        optimizing.ema.update(expert)


def skip_nonfinite_step(
    model: TrainedModel,
    optimizing: Optimization,
    *,
    loss: float,
    norm: float,
    position: Position,
    window: list[Drawn],
) -> None:
    """Skip a step whose loss or gradient is NaN or Inf.

    In fp16 the loss scale starts too high, so an overflow is not an error as long as the scale can be lowered.
    """
    scaler = model.accelerator.scaler
    if scaler is None or not math.isfinite(loss) or scaler.get_scale() <= 1:
        skip_or_stop(optimizing, loss=loss, norm=norm, position=position, window=window)
    if scaler is not None:
        optimizing.optimizer.step()  # the scaler skips the step and lowers its scale
    optimizing.stepping.settle()


def skip_or_stop(
    optimizing: Optimization, *, loss: float, norm: float, position: Position, window: list[Drawn]
) -> None:
    """Skip a step whose loss or gradient is NaN or Inf, up to `skip_nonfinite` times; then raise RunError."""
    label = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
    places = ", ".join(list(sampled(window))[:8])
    where = f"{label} at step {position.step}, epoch {position.epoch} ({places})"
    skipped, limit = optimizing.skipped, optimizing.skip_nonfinite
    skipped.count += 1
    taken = "before the step was taken" if optimizing.stepping.fused is None else "with that part of the step left out"
    if skipped.count > limit:
        raise RunError(
            f"{where}: stopped {taken}; files saved earlier are complete. "
            "Lower --learning_rate, check that sample's cache, or skip some steps with --skip_nonfinite"
        )
    log.warning("%s: step skipped (%d of at most %d)", where, skipped.count, limit)


def sampled(window: list[Drawn]) -> Iterator[str]:
    """Describe the samples of a step with their t."""
    for drawn in window:
        pairs = zip(drawn.batch.keys, drawn.draws.t, strict=True)
        yield from (f"{key.item} at t {float(t):.4f}" for key, t in pairs)
