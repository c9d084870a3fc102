"""One optimizer step over a window of batches."""

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dataset.batches import Batch
from wan_train.cli import RunError
from wan_train.conditions import Conditions
from wan_train.log import get_logger
from wan_train.training.metrics import StepMetrics, loss_by_stratum, num_tokens, peak_memory_mib
from wan_train.training.objective import Draws, Losses, draw, measure
from wan_train.training.optimizer_state import learning_rates
from wan_train.training.prior import prior_loss
from wan_train.training.run import Run
from wan_train.training.state import Position

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


def take_step(run: Run, window: list[Batch], position: Position) -> tuple[StepMetrics, int]:
    """Take the step, and the signal that asks to stop after it, or 0. RunError for one that cannot be taken."""
    began = time.perf_counter()
    drawn = [draws_of(run, batch, position.epoch) for batch in window]
    means, samples = [], []
    for index, (batch, draws) in enumerate(zip(window, drawn, strict=True)):
        losses = learn(run, batch, draws, position.epoch, share=1 / len(window), last=index + 1 == len(window))
        means.append(losses.mean)
        samples.append(losses.samples)
    shared = share(run, torch.stack(means).mean(), torch.cat([draws.t for draws in drawn]), torch.cat(samples))
    norm = clip(run)
    if math.isfinite(shared.loss) and math.isfinite(norm):
        update(run)
    else:
        skip_or_stop(run, shared.loss, norm, position, window, drawn)
    rates = learning_rates(run.optimizer)
    run.optimizer.zero_grad(set_to_none=True)
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
        tokens_per_second=sum(num_tokens(batch.latents.shape) for batch in window) * run.num_processes / seconds,
        strata=loss_by_stratum(shared.t[finite], shared.samples[finite]),
        learning_rates=rates if len(rates) > 1 else {},
    )
    return metrics, shared.signal


def draws_of(run: Run, batch: Batch, epoch: int) -> Draws:
    """Noise and noise level of each sample, by its key."""
    shape = batch.latents.shape[1:]
    return draw(batch.keys, shape, run.settings.timesteps, seed=run.seed, epoch=epoch, strata=run.strata)


def learn(run: Run, batch: Batch, draws: Draws, epoch: int, *, share: float, last: bool) -> Losses:
    """Add this batch's gradient, times `share`; the losses, detached. `last`: processes exchange gradients here."""
    device = run.accelerator.device
    latents, placed = batch.latents.to(device), draws.to(device)
    weights = None if batch.weights is None else batch.weights.to(device)
    conditions = Conditions(tuple(batch.context)).to(device)
    seed_dropout(run.seed, epoch, batch)
    prior = None if run.prior is None or batch.is_reg else run.prior
    with exchange(run, now=last and prior is None):
        losses = measure(run.model, latents, conditions, placed, weights=weights, settings=run.settings.loss)
        run.accelerator.backward(losses.mean * (share * batch.loss_weight))
    mean = losses.mean.detach() * batch.loss_weight
    if prior is not None:
        kept = prior.choose(batch.keys, seed=run.seed, epoch=epoch).to(device)
        with exchange(run, now=last):
            loss = prior_loss(run.model, run.dit, run.adapter, latents, kept, placed) * prior.weight
            run.accelerator.backward(loss * share)
        mean = mean + loss.detach()
    return Losses(mean, losses.samples)


def exchange(run: Run, *, now: bool) -> AbstractContextManager[None]:
    """Whether processes exchange the gradients of the backward pass inside, or add them up first."""
    return nullcontext() if now else run.accelerator.no_sync(run.model)


def seed_dropout(seed: int, epoch: int, batch: Batch) -> None:
    """Let all that the model draws for this batch depend on the run's seed, the epoch and its samples alone."""
    names = "/".join(f"{key.item} {key.repeat}" for key in batch.keys)
    digest = hashlib.blake2b(f"{seed}/{epoch}/{names}/dropout".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)


def share(run: Run, loss: Tensor, t: Tensor, samples: Tensor) -> Shared:
    """What the processes know together; the mean loss and the wish to stop in one exchange."""
    local = torch.stack([loss.double(), torch.tensor(float(run.stop.signal), dtype=torch.float64, device=loss.device)])
    rows = run.accelerator.gather(local.unsqueeze(0)).cpu()
    return Shared(float(rows[:, 0].mean()), t.cpu(), samples.detach().cpu(), int(rows[:, 1].max()))


def clip(run: Run) -> float:
    """Clip the gradient as the settings say and return its norm before."""
    limit = run.settings.loop.max_grad_norm or math.inf
    return float(run.accelerator.clip_grad_norm_(list(run.trained.values()), limit))


def update(run: Run) -> None:
    """Let the parameters take the step."""
    run.optimizer.step()
    limit = run.settings.network.scale_weight_norms
    if limit is not None:
        run.adapter.scale_norms(limit)
    if run.ema is not None:
        run.ema.update()


def skip_or_stop(
    run: Run, loss: float, norm: float, position: Position, window: list[Batch], drawn: list[Draws]
) -> None:
    """Leave a step out whose loss or gradient is no number, as often as `--skip_nonfinite` lets; then RunError."""
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
    places = ", ".join(list(sampled(window, drawn))[:8])
    where = f"{what} at step {position.step}, epoch {position.epoch} ({places})"
    run.skipped.count += 1
    if run.skipped.count > run.settings.loop.skip_nonfinite:
        raise RunError(
            f"{where}: stopped before the step was taken; files saved before this are whole. "
            "Lower --learning_rate, look at that sample's cache, or let some pass with --skip_nonfinite"
        )
    log.warning("%s: left out, %d of %d", where, run.skipped.count, run.settings.loop.skip_nonfinite)


def sampled(window: list[Batch], drawn: list[Draws]) -> Iterator[str]:
    """The samples of a step with their t, in words."""
    for batch, draws in zip(window, drawn, strict=True):
        yield from (f"{key.item} at t {float(t):.4f}" for key, t in zip(batch.keys, draws.t, strict=True))
