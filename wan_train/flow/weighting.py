"""Loss weights by noise level: `--weighting_scheme` (Esser et al. 2024, section 3.1)."""

import math
from collections.abc import Callable

from torch import Tensor

from wan_train.flow.timesteps import NUM_TIMESTEPS


def _sigma_sqrt(t: Tensor) -> Tensor:
    # Clamped to the first timestep of the DiT: below it the weight, and its mean, would be unbounded.
    return t.clamp(1 / NUM_TIMESTEPS) ** -2


def _cosmap(t: Tensor) -> Tensor:
    return 2 / (math.pi * (1 - 2 * t + 2 * t * t))


WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {"sigma_sqrt": _sigma_sqrt, "cosmap": _cosmap}


def importance(scheme: str, t: Tensor) -> Tensor | None:
    """Return the weight of each t: t^-2 for sigma_sqrt, 2 / (pi (1 - 2t + 2t^2)) for cosmap; None: equal weights."""
    weigh = WEIGHTINGS.get(scheme)
    return None if weigh is None else weigh(t)
