"""Take one optimizer step over a window of batches."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from dataset.batching.batches import Batch
from networks.adapter import Adapter
from wan_train.flow.keyed import seed_of
from wan_train.placement.transfers import Timer, send
from wan_train.training.experts.models import TrainedModel
from wan_train.training.experts.pair import PairAdapter, PairModel
from wan_train.training.experts.plan import ExpertPlan
from wan_train.training.objective.loss import Draws, Losses, measure
from wan_train.training.objective.objective import Objective
from wan_train.training.objective.prior import prior_loss
from wan_train.training.objective.target import Target, target_of
from wan_train.training.optimizing.optimization import Optimization
from wan_train.training.optimizing.optimizer_state import learning_rates, skipping
from wan_train.training.outcome import (
    Facts,
    Launched,
    Measures,
    Values,
    defers_reading,
    gather_rows,
    skip_or_stop,
)
from wan_train.training.reporting.metrics import num_tokens, peak_memory_mib
from wan_train.training.saving.state import Position
from wan_train.training.stopping import StopRequest

CPU = torch.device("cpu")
NORM_EVERY = 20  # steps between measurements of the adapter's norm, which synchronise with the device


@dataclass(frozen=True)
class Drawn:
    """A batch with its target, noise and noise levels, and the expert that it trains, if there are two."""

    batch: Batch
    target: Target
    draws: Draws
    expert: str | None = None

    def pinned(self, device: torch.device) -> "Drawn":
        """Return it in pinned CPU RAM, for copies to `device`."""
        return replace(self, target=self.target.pinned(device), draws=self.draws.pinned(device))


def with_draws(
    batches: Iterable[Batch],
    position: Position,
    *,
    objective: Objective,
    experts: ExpertPlan,
    batches_per_step: int,
    device: torch.device = CPU,
) -> Iterator[Drawn]:
    """Yield the batches that follow a position, each with noise and noise levels keyed by its samples, in pinned memory
    for copies to `device`."""
    for index, batch in enumerate(batches):
        expert = experts.at(position.step + 1 + index // batches_per_step)
        limits = experts.limits(expert, objective.timesteps)
        target = target_of(batch)
        yield Drawn(batch, target, objective.draw(batch, target, position.epoch, limits), expert).pinned(device)


def take_step(
    window: list[Drawn],
    position: Position,
    *,
    model: TrainedModel,
    optimizing: Optimization,
    objective: Objective,
    stop: StopRequest,
) -> Launched:
    """Launch the step and return what tells how it went. If its values are not deferred, they have been read, and
    RunError is raised if the loss or gradient is NaN or Inf too often."""
    defers, expert = defers_reading(model.accelerator, optimizing), window[0].expert
    timer, facts = Timer(model.device if defers else CPU), facts_of(window, position, model)
    measures = measure_step(window, position, model=model, optimizing=optimizing, objective=objective, stop=stop)
    reading = None if defers else measures.read()
    if reading is None:
        with skipping(optimizing.optimizer, measures.nonfinite()):
            update(model.adapter, optimizing, expert)
    elif (values := reading.values()).is_finite:
        update(model.adapter, optimizing, expert)
    else:
        skip_nonfinite_step(model, optimizing, values, facts)
    rates = learning_rates(optimizing.optimizer)
    for parameter in model.trained.values():
        parameter.grad = None
    optimizing.schedule.step()
    timer.stop()
    return Launched(
        facts=facts,
        # Deferred values come after the timer's end, so that the time is known once they are there.
        reading=reading or measures.read(),
        timer=timer,
        optimizing=optimizing,
        rates=rates,
        memory_mib=peak_memory_mib(model.device),
        # Python waits for the norm.
        adapter_norm=model.adapter.norm() if position.step % NORM_EVERY == 0 else None,
        is_deferred=defers,
    )


def measure_step(
    window: list[Drawn],
    position: Position,
    *,
    model: TrainedModel,
    optimizing: Optimization,
    objective: Objective,
    stop: StopRequest,
) -> Measures:
    """Compute the clipped gradient of the step; return its loss and norm, on the device."""
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
    rows = gather_rows(model.accelerator, torch.stack(means).mean(), stop.signal)
    clear_idle_gradients(model.adapter, window[0].expert)
    return Measures(rows, torch.cat(samples).detach().float(), clip(model, optimizing))


def facts_of(window: list[Drawn], position: Position, model: TrainedModel) -> Facts:
    """Return what is known of a step beforehand."""
    tokens = sum(num_tokens(drawn.target.latents.shape) for drawn in window)
    return Facts(
        position=position,
        items=[key.item for drawn in window for key in drawn.batch.keys],
        levels=torch.cat([drawn.draws.t for drawn in window]),
        num_tokens=tokens * model.num_processes,
        expert=window[0].expert if model.experts.is_pair else None,
    )


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
        kept = conditions.with_context([send(rows, device) for rows in texts])
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


def clip(model: TrainedModel, optimizing: Optimization) -> Tensor | float:
    """Clip the gradient and return its norm before clipping, (), on the device; a fused backward pass has clipped
    already, and only returns the norm."""
    if optimizing.stepping.fused is not None:
        return optimizing.stepping.fused.finish()
    limit = optimizing.max_grad_norm or math.inf
    norm: Tensor = model.accelerator.clip_grad_norm_(list(model.trained.values()), limit)
    return norm


def update(adapter: Adapter, optimizing: Optimization, expert: str | None) -> None:
    """Step the optimizer, scale weight norms and update the EMA of the active expert."""
    optimizing.optimizer.step()
    optimizing.stepping.settle()
    if optimizing.scale_weight_norms is not None:
        adapter.scale_norms(optimizing.scale_weight_norms)
    if optimizing.ema is not None:
        optimizing.ema.update(expert)


def skip_nonfinite_step(model: TrainedModel, optimizing: Optimization, values: Values, facts: Facts) -> None:
    """Skip a step whose loss or gradient is NaN or Inf.

    In fp16 the loss scale starts too high, so an overflow is not an error as long as the scale can be lowered.
    """
    scaler = model.accelerator.scaler
    if scaler is None or not math.isfinite(values.loss) or scaler.get_scale() <= 1:
        skip_or_stop(optimizing, values, facts)
    if scaler is not None:
        optimizing.optimizer.step()  # the scaler skips the step and lowers its scale
    optimizing.stepping.settle()
