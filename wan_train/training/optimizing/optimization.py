"""Optimizer, schedule and EMA of the trained parameters."""

from dataclasses import dataclass
from typing import Any

import torch

from wan_train.training.carried import RunningMean, Skipped
from wan_train.training.optimizing.ema import AveragedWeights
from wan_train.training.optimizing.stepping import Stepping


@dataclass(frozen=True)
class Optimization:
    """The optimizer of a run, its schedule and EMA, limits of a step, and running statistics.

    `optimizer` is that of `stepping`, wrapped by accelerate. `max_grad_norm` 0 disables clipping; `scale_weight_norms`
    is the maximum norm of each module's change, None for no limit; at most `skip_nonfinite` steps are skipped.
    `average` is the mean loss of recent steps.
    """

    optimizer: torch.optim.Optimizer
    stepping: Stepping
    schedule: Any
    ema: AveragedWeights | None
    average: RunningMean
    skipped: Skipped
    max_grad_norm: float
    skip_nonfinite: int
    scale_weight_norms: float | None
