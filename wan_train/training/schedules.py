"""Learning rates over the run."""

from typing import Any

import torch

from wan_train.cli import InputError
from wan_train.training.settings import OptimizerSettings


def warmup_steps(text: str, total: int) -> int:
    """Steps of warm-up from a number, a share below 1 or a percentage of `total`."""
    try:
        if text.strip().endswith("%"):
            share = float(text.strip()[:-1]) / 100
        else:
            value = float(text)
            if value >= 1 or value == 0:
                if value != int(value):
                    raise ValueError
                share = value / total
            else:
                share = value
    except ValueError:
        raise InputError(f"--lr_warmup_steps takes a number, a share below 1 or a percentage, not {text!r}") from None
    steps = round(share * total)
    if not 0 <= steps <= total:
        raise InputError(f"--lr_warmup_steps {text} is outside the run's {total} steps")
    return steps


def make_schedule(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, *, total: int) -> Any:
    """The schedule, to be stepped once for each optimizer step. A constant rate with a warm-up warms up too."""
    from transformers import get_scheduler

    warmup = warmup_steps(settings.lr_warmup_steps, total)
    name = "constant_with_warmup" if settings.lr_scheduler == "constant" and warmup else settings.lr_scheduler
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
