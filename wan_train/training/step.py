"""One optimizer step over a window of batches."""

import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dataset.batching.batches import Batch
from wan_train.errors import RunError
from wan_train.log import get_logger
from wan_train.models.variants import VARIANTS
from wan_train.training.experts.pair import PairAdapter, PairModel
from wan_train.training.objective.conditioning import conditions_of, drop_pictures, dropping_rate
from wan_train.training.objective.loss import Draws, Losses, draw, measure
from wan_train.training.objective.prior import prior_loss
from wan_train.training.optimizing.optimizer_state import learning_rates
from wan_train.training.reporting.metrics import StepMetrics, loss_by_stratum, num_tokens, peak_memory_mib
from wan_train.training.run import Run
from wan_train.training.saving.state import Position

log = get_logger(__name__)

NORM_EVERY = 20  # steps between looks at the adapter's norm, which wait for the device


@dataclass(frozen=True)
class Shared:
    """What all processes know of a step: the mean loss, t and loss (N,) of every sample, and the signal that one of
    them got, or 0."""

    loss: float
    t: Tensor
    samples: Tensor
    signal: int


@dataclass(frozen=True)
class Drawn:
    """A batch with its noise and noise levels, and the expert that it is for, if there are two."""

    batch: Batch
    draws: Draws
    expert: str | None = None


def with_draws(run: Run, batches: Iterable[Batch], position: Position) -> Iterator[Drawn]:
    """The batches that follow a position, each with what is drawn for its samples by their keys."""
    size = run.settings.loop.gradient_accumulation_steps
    for index, batch in enumerate(batches):
        shape, settings = batch.latents.shape[1:], run.settings.timesteps
        expert = run.experts.at(position.step + 1 + index // size)
        draws = draw(
            batch.keys,
            shape,
            settings,
            seed=run.seed,
            epoch=position.epoch,
            strata=run.strata,
            limits=run.experts.limits(expert, settings),
        )
        yield Drawn(batch, draws, expert)


def take_step(run: Run, window: list[Drawn], position: Position) -> tuple[StepMetrics, int]:
    """Take the step, and the signal that asks to stop after it, or 0. RunError for one that cannot be taken."""
    began = time.perf_counter()
    means, samples = [], []
    for index, drawn in enumerate(window):
        losses = learn(run, drawn, position.epoch, share=1 / len(window), last=index + 1 == len(window))
        means.append(losses.mean)
        samples.append(losses.samples)
    levels = torch.cat([drawn.draws.t for drawn in window])
    shared = share(run, torch.stack(means).mean(), levels, torch.cat(samples))
    let_idle_rest(run, window[0].expert)
    norm = clip(run) if run.stepping.fused is None else run.stepping.fused.finish()
    if math.isfinite(shared.loss) and math.isfinite(norm):
        update(run, window[0].expert)
    else:
        leave_out(run, shared.loss, norm, position, window)
    rates = learning_rates(run.optimizer)
    for parameter in run.trained.values():
        parameter.grad = None
    run.schedule.step()
    seconds = time.perf_counter() - began
    finite = shared.samples.isfinite()
    metrics = StepMetrics(
        step=position.step,
        epoch=position.epoch,
        loss=shared.loss,
        loss_average=run.average.add(shared.loss) if math.isfinite(shared.loss) else run.average.mean,
        lr=next(iter(rates.values())),
        grad_norm=norm,
        seconds=seconds,
        memory_mib=peak_memory_mib(run.accelerator.device),
        adapter_norm=run.adapter.norm() if position.step % NORM_EVERY == 0 else None,
        tokens_per_second=sum(num_tokens(drawn.batch.latents.shape) for drawn in window) * run.num_processes / seconds,
        strata=loss_by_stratum(shared.t[finite], shared.samples[finite]),
        learning_rates=rates if len(rates) > 1 else {},
        expert=window[0].expert if run.experts.is_pair else None,
    )
    return metrics, shared.signal


def learn(run: Run, drawn: Drawn, epoch: int, *, share: float, last: bool) -> Losses:
    """Add this batch's gradient, times `share`; the losses, detached. `last`: processes exchange gradients here."""
    batch, device = drawn.batch, run.accelerator.device
    if isinstance(run.dit, PairModel):
        run.dit.of(str(drawn.expert))
    latents, placed = batch.latents.to(device), drawn.draws.to(device)
    weights = None if batch.weights is None else batch.weights.to(device)
    variant = VARIANTS[run.settings.dit.task]
    rate = dropping_rate(run.settings.pictures, variant)
    dropped = drop_pictures(batch.keys, rate, seed=run.seed, epoch=epoch)
    conditions = conditions_of(batch, device, without_pictures=dropped, fused=variant.is_fused)
    seed_dropout(run.seed, epoch, batch, device)
    prior = None if run.prior is None or batch.is_reg else run.prior
    with exchange(run, now=last and prior is None):
        losses = measure(run.model, latents, conditions, placed, weights=weights, settings=run.settings.loss)
        if run.stepping.fused is None or is_finite_everywhere(run, losses.mean):
            run.accelerator.backward(losses.mean * (share * batch.loss_weight))
    mean = losses.mean.detach() * batch.loss_weight
    if prior is not None:
        texts = prior.choose(batch.keys, seed=run.seed, epoch=epoch)
        kept = conditions.with_context([rows.to(device) for rows in texts])
        with exchange(run, now=last):
            loss = prior_loss(run.model, run.dit, run.adapter, latents, kept, placed) * prior.weight
            run.accelerator.backward(loss * share)
        mean = mean + loss.detach()
    return Losses(mean, losses.samples)


def is_finite_everywhere(run: Run, loss: Tensor) -> bool:
    """Whether no process has a loss that is no number: where steps are taken on the way, this is known before."""
    return bool(run.accelerator.gather(loss.detach().unsqueeze(0)).isfinite().all())


def let_idle_rest(run: Run, expert: str | None) -> None:
    """Take the gradient, which is nothing, from the adapter whose turn it is not, so that no step is taken with it."""
    if isinstance(run.adapter, PairAdapter):
        for other, _ in run.adapter.parts.items():
            for parameter in run.adapter.parameters_of(other) if other != expert else ():
                parameter.grad = None


def exchange(run: Run, *, now: bool) -> AbstractContextManager[None]:
    """Whether processes exchange the gradients of the backward pass inside, or add them up first."""
    return nullcontext() if now else run.accelerator.no_sync(run.model)


def seed_dropout(seed: int, epoch: int, batch: Batch, device: torch.device) -> None:
    """Let all that the model draws for this batch depend on the run's seed, the epoch and its samples alone."""
    names = "/".join(f"{key.item} {key.repeat}" for key in batch.keys)
    digest = hashlib.blake2b(f"{seed}/{epoch}/{names}/dropout".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big") >> 1
    # Not torch.manual_seed: where CUDA is not in use it formats the call stack for later, half a millisecond each time.
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


def share(run: Run, loss: Tensor, t: Tensor, samples: Tensor) -> Shared:
    """What the processes know together; the mean loss and the wish to stop in one exchange."""
    local = torch.stack([loss.float(), torch.tensor(float(run.stop.signal), device=loss.device)])
    rows = run.accelerator.gather(local.unsqueeze(0)).cpu().double()
    return Shared(float(rows[:, 0].mean()), t.cpu(), samples.detach().cpu(), int(rows[:, 1].max()))


def clip(run: Run) -> float:
    """Clip the gradient as the settings say and return its norm before."""
    limit = run.settings.loop.max_grad_norm or math.inf
    return float(run.accelerator.clip_grad_norm_(list(run.trained.values()), limit))


def update(run: Run, expert: str | None = None) -> None:
    """Let the parameters take the step, those of one of two experts."""
    run.optimizer.step()
    run.stepping.settle()
    limit = run.settings.network.scale_weight_norms
    if limit is not None:
        run.adapter.scale_norms(limit)
    if run.ema is not None:
        run.ema.update(expert)


def leave_out(run: Run, loss: float, norm: float, position: Position, window: list[Drawn]) -> None:
    """Leave a step out whose loss or gradient is no number.

    In fp16 the gradient is scaled up, too far at first: that is no fault of the run as long as the scale can fall.
    """
    scaler = run.accelerator.scaler
    if scaler is None or not math.isfinite(loss) or scaler.get_scale() <= 1:
        skip_or_stop(run, loss, norm, position, window)
    if scaler is not None:
        run.optimizer.step()  # the scaler takes no step, and lowers its scale
    run.stepping.settle()


def skip_or_stop(run: Run, loss: float, norm: float, position: Position, window: list[Drawn]) -> None:
    """Let a step pass whose loss or gradient is no number, as often as `--skip_nonfinite` says; then RunError."""
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
    places = ", ".join(list(sampled(window))[:8])
    where = f"{what} at step {position.step}, epoch {position.epoch} ({places})"
    run.skipped.count += 1
    taken = "before the step was taken" if run.stepping.fused is None else "with that part of the step left out"
    if run.skipped.count > run.settings.loop.skip_nonfinite:
        raise RunError(
            f"{where}: stopped {taken}; files saved before this are whole. "
            "Lower --learning_rate, look at that sample's cache, or let some pass with --skip_nonfinite"
        )
    log.warning("%s: left out, %d of %d", where, run.skipped.count, run.settings.loop.skip_nonfinite)


def sampled(window: list[Drawn]) -> Iterator[str]:
    """The samples of a step with their t, in words."""
    for drawn in window:
        pairs = zip(drawn.batch.keys, drawn.draws.t, strict=True)
        yield from (f"{key.item} at t {float(t):.4f}" for key, t in pairs)
