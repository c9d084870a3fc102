"""Measure the loss on held-out clips with fixed noise, so that differences come from the model alone.

Each clip gets the same noise at the same noise levels in every evaluation, keyed by `--validation_seed`, its name and
the stratum. The levels are stratified: one from each of K equally likely parts of the training distribution, so that
their mean estimates the training objective.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from dataset.batching.ahead import read_ahead
from dataset.batching.batches import Batch, CachedDataset, collate
from dataset.batching.order import SampleKey
from dataset.batching.split import find_shared, name_files, split_off
from dataset.sources import name_some
from wan_train.errors import InputError
from wan_train.flow.keyed import generator_of
from wan_train.flow.timesteps import Span
from wan_train.flow.weighting import importance
from wan_train.log import get_logger
from wan_train.models.variants import Variant
from wan_train.training.evaluating.statistics import Evaluation, History, Losses
from wan_train.training.experts.pair import PairModel
from wan_train.training.experts.plan import ExpertPlan
from wan_train.training.objective.conditioning import Rates, conditions_of, drop
from wan_train.training.objective.loss import Draws, draw_levels, measure
from wan_train.training.objective.target import target_of
from wan_train.training.settings import LossSettings, TimestepSettings, ValidationSettings

log = get_logger(__name__)

FEW = 5  # with four files the interval is 1.9 times as wide as the plain bootstrap's


@dataclass(frozen=True)
class Data:
    """The training clips and, if some are held out, the validation clips."""

    training: CachedDataset
    held_out: CachedDataset | None


def check_validation(settings: ValidationSettings) -> None:
    """Raise InputError for options that contradict each other."""
    if settings.validation_config is not None and settings.validation_split is not None:
        raise InputError(
            f"--validation_config {settings.validation_config} and --validation_split {settings.validation_split:g}"
            " both say what is held out: leave out one"
        )
    every = settings.validate_every_n_steps or settings.validate_every_n_epochs
    if settings.early_stop is not None and not every:
        raise InputError(
            f"--early_stop {settings.early_stop} needs evaluations: give --validate_every_n_steps or _epochs"
        )
    if every and settings.validation_config is None and settings.validation_split is None:
        raise InputError(
            "--validate_every_n_steps and _epochs need a validation set: give --validation_config or --validation_split"
        )


def hold_out(dataset: CachedDataset, settings: ValidationSettings, read: Callable[[str], CachedDataset]) -> Data:
    """Split training and validation clips as the settings say; `read` opens the caches that a TOML file describes.

    Raise InputError if too few files are held out for what is requested.
    """
    if settings.validation_split is not None:
        split = split_off(dataset, settings.validation_split, seed=settings.validation_seed)
        data = Data(split.training, split.held_out)
    elif settings.validation_config is not None:
        data = Data(dataset, read(settings.validation_config))
    else:
        return Data(dataset, None)
    assert data.held_out is not None
    if shared := find_shared(data.training, data.held_out):
        log.warning("%d validation files are also in the training set (%s)", len(shared), name_some(shared))
    num_files = len(set(name_files(data.held_out)))
    if settings.early_stop is not None and num_files < 2:
        raise InputError(
            "--early_stop needs a confidence interval, which one validation file cannot give: hold out two or more"
        )
    num_clips = sum(len(plan.clips) for plan in data.held_out.plans)
    wide = "" if num_files >= FEW else ", too few for narrow confidence intervals"
    log.info("validation: %d clips of %d files%s", num_clips, num_files, wide)
    return data


class Validator:
    """Measures the validation loss and compares it with earlier measurements.

    Each clip counts once regardless of `num_repeats`, with its first caption and without augmentation. Batches have the
    dataset's `batch_size`, and the last batch of a bucket may be smaller. `without_images` is the share of clips,
    always the same ones, that a combined text- and image-to-video model is evaluated on as text-to-video; other models
    always get all conditions.
    """

    def __init__(
        self,
        dataset: CachedDataset,
        settings: ValidationSettings,
        timesteps: TimestepSettings,
        loss: LossSettings,
        experts: ExpertPlan | None = None,
        *,
        variant: Variant,
        without_images: float | None = None,
    ) -> None:
        experts = experts or ExpertPlan()
        self._variant, self._without = variant, without_images
        self.settings, self._dataset, self._timesteps, self._loss = settings, dataset, timesteps, loss
        # In the order of increasing noise, like the strata of a single model.
        trained: list[str | None] = [*reversed(experts.trained)] or [None]
        self._parts = [(expert, experts.limits(expert, timesteps)) for expert in trained]
        self._batches = cut_batches(dataset)
        order = [position for batch in self._batches for position in batch]
        self._rows = {position: row for row, position in enumerate(order)}
        self._names = [dataset.keys[position].item for position in order]
        files = name_files(dataset)
        self.history = History([files[position] for position in order], seed=settings.validation_seed)

    @property
    def should_stop(self) -> bool:
        """Whether `--early_stop` evaluations in a row brought no significant improvement."""
        limit = self.settings.early_stop
        return limit is not None and self.history.since >= limit

    def has_evaluated(self, step: int) -> bool:
        """Return whether the last evaluation was at this step."""
        return bool(self.history.means) and self.history.means[-1][0] == step

    def evaluate(self, model: nn.Module, accelerator: Accelerator, *, step: int) -> Evaluation:
        """Measure the model at a step and compare with earlier steps. Called by all processes together; all get the
        same result."""
        names = [expert for expert, _ in self._parts if expert and len(self._parts) > 1]
        evaluation = self.history.add(step, self.measure(model, accelerator), experts=names)
        if accelerator.is_main_process:
            alarming = evaluation.verdict in ("worse", "not finite")
            log.log(logging.WARNING if alarming else logging.INFO, evaluation.describe())
        return evaluation

    def measure(self, model: nn.Module, accelerator: Accelerator) -> Losses:
        """Return the losses (N, K) of all validation clips in all strata, equal on all processes.

        The model's gradients and mode and all shared random generators are left unchanged.
        """
        shares = math.ceil(len(self._batches) / accelerator.num_processes)
        # All processes must run the same number of batches, to gather a sharded model; duplicates are dropped below.
        padded = itertools.islice(itertools.cycle(self._batches), shares * accelerator.num_processes)
        mine = list(itertools.islice(padded, accelerator.process_index, None, accelerator.num_processes))
        num_strata = self.settings.validation_timesteps
        table = np.zeros((len(self._rows), len(self._parts) * num_strata), np.float32)
        with evaluating(model):
            # One expert at a time, since switching may move models.
            for part, (expert, limits) in enumerate(self._parts):
                if isinstance(model, PairModel):
                    model.of(str(expert))
                for position, values in gather_object(self._measure_part(model, mine, limits, accelerator)):
                    table[self._rows[position], part * num_strata : (part + 1) * num_strata] = values
        return table

    def _measure_part(
        self, model: nn.Module, mine: Sequence[list[int]], limits: Span | None, accelerator: Accelerator
    ) -> list[tuple[int, list[float]]]:
        """Return the losses of these batches' clips, by position, at noise levels within `limits`."""
        batches = (collate([self._dataset[position] for position in batch]) for batch in mine)
        reading = read_ahead(batches, device=accelerator.device)
        shown = tqdm(
            zip(mine, reading, strict=True),
            desc="validation loss",
            total=len(mine),
            delay=2,
            leave=False,
            disable=not accelerator.is_main_process,
        )
        measured: list[tuple[int, list[float]]] = []
        for positions, batch in shown:
            losses = self._measure_batch(model, batch, limits, accelerator.device)
            measured += zip(positions, losses.tolist(), strict=True)
        return measured

    def _measure_batch(self, model: nn.Module, batch: Batch, limits: Span | None, device: torch.device) -> Tensor:
        """Return the losses (B, K) of a batch, on the CPU."""
        target, seed = target_of(batch).to(device), self.settings.validation_seed
        dropped = drop(batch.keys, Rates(self._without or 0.0), seed=seed, epoch=0)
        conditions = conditions_of(batch, self._variant, device, dropped=dropped)
        losses = []
        for stratum in range(self.settings.validation_timesteps):
            draws = draw_stratum(
                batch.keys,
                target.latents.shape[1:],
                self._timesteps,
                stratum=stratum,
                num_strata=self.settings.validation_timesteps,
                seed=seed,
                limits=limits,
            ).to(device)
            measured = measure(model, target.latents, conditions, draws, weights=target.weights, settings=self._loss)
            losses.append(measured.samples)
        return torch.stack(losses, dim=1).cpu()

    def state_dict(self) -> dict[str, Any]:
        """Return the measurements and everything that later comparisons depend on."""
        return {"clips": self._names, "measure": self._measure(), "history": self.history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; start over, with a warning, if the clips or noise levels have changed."""
        if state["clips"] != self._names or state["measure"] != self._measure():
            log.warning(
                "the validation clips or timesteps have changed: the validation loss is not compared with earlier ones"
            )
            return
        self.history.load_state_dict(state["history"])

    def _measure(self) -> str:
        settings = self.settings
        parts = "" if self._parts[0][0] is None else f"{self._parts} "
        parts += "" if self._without is None else f"{self._without} "
        return parts + f"{settings.validation_timesteps} {settings.validation_seed} {self._timesteps} {self._loss}"


def cut_batches(dataset: CachedDataset) -> list[list[int]]:
    """Return the positions of all clips, once each, batched by bucket with the dataset's batch size."""
    batches = []
    for bucket, positions in sorted(dataset.buckets.items()):
        size = dataset.configs[bucket.dataset].batch_size
        first = [position for position in positions if dataset.keys[position].repeat == 0]
        batches += [first[start : start + size] for start in range(0, len(first), size)]
    return batches


def draw_stratum(
    keys: Sequence[SampleKey],
    shape: Sequence[int],
    timesteps: TimestepSettings,
    *,
    stratum: int,
    num_strata: int,
    seed: int,
    limits: Span | None = None,
) -> Draws:
    """Draw noise of latents of a `shape` and t in this stratum for each sample, keyed by seed, name and stratum alone.

    Strata divide the distribution of the settings, or its part within `limits`.
    """
    uniforms, noises = [], []
    for key in keys:
        generator = generator_of(f"held out/{seed}/{stratum}/{key.item}")
        uniforms.append((stratum + float(torch.rand((), generator=generator))) / num_strata)
        noises.append(torch.randn(*shape, generator=generator))
    t = draw_levels(uniforms, (shape[-2], shape[-1]), timesteps, limits)
    return Draws(t, torch.stack(noises), importance(timesteps.weighting_scheme, t))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Disable dropout and gradients of the model, and restore the mode of each module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
