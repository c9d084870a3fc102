"""What changes the trained parameters in a step."""

from dataclasses import dataclass
from typing import Any

import torch

from wan_train.training.carried import RunningMean, Skipped
from wan_train.training.optimizing.ema import AveragedWeights
from wan_train.training.optimizing.stepping import Stepping


@dataclass(frozen=True)
class Optimization:
    """The optimizer of a run with its schedule, the limits that hold for each step, and what is counted of the steps.

    `optimizer` is what accelerate made of that of `stepping`. `max_grad_norm` 0 does not clip; `scale_weight_norms` is
    the largest norm of each module's change, None for any; at most `skip_nonfinite` steps are left out. `average` is
    the mean loss of the last steps.
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
