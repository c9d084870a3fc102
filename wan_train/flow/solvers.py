"""Solvers of the sampling ODE on the official sigma grids.

The steps of the multistep solvers are diffusers' (UniPC, Zhao et al. 2023; DPM-Solver++, Lu et al. 2022); the noise
levels are those of the official Wan sampler. Euler needs torch alone, so that the generator runs without diffusers.
`lcm` is for models distilled to few steps: it predicts the data at every step and adds new noise for the next level
(latent consistency models, Luo et al. 2023, algorithm 3).
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from wan_train.cli import choose
from wan_train.errors import InputError
from wan_train.flow.path import interpolate
from wan_train.flow.timesteps import NUM_TIMESTEPS
from wan_train.packages import load, require

SIGMA_MAX_UNIPC = 0.999  # the official table starts one of its 1000 steps below pure noise
WITHOUT_DIFFUSERS = "use --sample_solver vanilla, which needs no package"


class Solver(Protocol):
    """A run from noise to data over a fixed grid of noise levels, step by step."""

    @property
    def sigmas(self) -> Tensor:
        """Noise levels (N+1,) float32, from about 1 (or where the run starts) to 0."""

    @property
    def timesteps(self) -> Tensor:
        """The timestep of each step for the DiT (N,), 0..1000."""

    def step(self, velocity: Tensor, timestep: Tensor, x: Tensor) -> Tensor:
        """Return x at the next noise level, given the model's velocity at this one."""


class _Diffusers:
    """A scheduler of diffusers on our grid of noise levels."""

    def __init__(self, scheduler: Any, sigmas: np.ndarray, timesteps: np.ndarray) -> None:
        self._scheduler = scheduler
        scheduler.set_timesteps(len(timesteps), device="cpu")
        scheduler.sigmas = torch.from_numpy(sigmas.astype(np.float32))
        scheduler.timesteps = torch.from_numpy(timesteps)
        scheduler.num_inference_steps = len(timesteps)
        # Truncated timesteps can repeat, so a search for the first one could find its duplicate.
        scheduler.set_begin_index(0)

    @property
    def sigmas(self) -> Tensor:
        return self._scheduler.sigmas

    @property
    def timesteps(self) -> Tensor:
        return self._scheduler.timesteps

    def step(self, velocity: Tensor, timestep: Tensor, x: Tensor) -> Tensor:
        return self._scheduler.step(velocity, timestep, x, return_dict=False)[0]


class _Euler:
    """Euler's method for the flow ODE dx/dt = v: x moves by the velocity times the difference of the noise levels."""

    def __init__(self, sigmas: np.ndarray) -> None:
        self.sigmas = torch.from_numpy(sigmas.astype(np.float32))
        self.timesteps = torch.from_numpy((NUM_TIMESTEPS * sigmas[:-1]).astype(np.float32))
        self._index = 0

    def step(self, velocity: Tensor, timestep: Tensor, x: Tensor) -> Tensor:
        now, following = self.sigmas[self._index], self.sigmas[self._index + 1]
        self._index += 1
        return (x.float() + (following - now) * velocity).to(velocity.dtype)


class _Renoising:
    """Predict x0 = x - sigma v at every step, then add noise for the next level."""

    def __init__(self, sigmas: np.ndarray, generator: torch.Generator) -> None:
        self.sigmas = torch.from_numpy(sigmas.astype(np.float32))
        self.timesteps = NUM_TIMESTEPS * self.sigmas[:-1]
        self._generator = generator
        self._index = 0

    def step(self, velocity: Tensor, timestep: Tensor, x: Tensor) -> Tensor:
        data = x - self.sigmas[self._index] * velocity
        self._index += 1
        following = self.sigmas[self._index]
        if following == 0:
            return data
        return interpolate(data, torch.randn(x.shape, generator=self._generator), following.expand(len(x)))


def _scheduler(name: str) -> Any:
    """Return a class of diffusers, which takes seconds to import."""
    return load("diffusers", name, "--sample_solver", instead=WITHOUT_DIFFUSERS)


def _multistep(name: str, sigmas: np.ndarray, **options: Any) -> Solver:
    scheduler = _scheduler(name)(prediction_type="flow_prediction", use_flow_sigmas=True, **options)
    return _Diffusers(scheduler, sigmas, (NUM_TIMESTEPS * sigmas[:-1]).astype(np.int64))


def _unipc(sigmas: np.ndarray, generator: torch.Generator) -> Solver:
    return _multistep("UniPCMultistepScheduler", sigmas, solver_order=2, solver_type="bh2")


def _dpmpp(sigmas: np.ndarray, generator: torch.Generator) -> Solver:
    return _multistep("DPMSolverMultistepScheduler", sigmas, algorithm_type="dpmsolver++", solver_type="midpoint")


def _euler(sigmas: np.ndarray, generator: torch.Generator) -> Solver:
    return _Euler(sigmas)


def _lcm(sigmas: np.ndarray, generator: torch.Generator) -> Solver:
    return _Renoising(sigmas, generator)


def check_solver(name: str) -> None:
    """Raise InputError if the package of the solver `name` is not installed."""
    if name in NEED_DIFFUSERS:
        require("diffusers", f"--sample_solver {name}", instead=WITHOUT_DIFFUSERS)


SOLVERS: dict[str, Callable[[np.ndarray, torch.Generator], Solver]] = {
    "unipc": _unipc,
    "dpm++": _dpmpp,
    "euler": _euler,
    "vanilla": _euler,
    "lcm": _lcm,
}
NEED_DIFFUSERS = ("unipc", "dpm++")


def make_solver(
    name: str,
    *,
    steps: int = 0,
    shift: float = 1.0,
    strength: float = 1.0,
    timesteps: Sequence[float] = (),
    generator: torch.Generator | None = None,
) -> Solver:
    """Return the solver `name` (unipc, dpm++, lcm, or euler, also called vanilla) on a shifted grid of noise levels.

    The grid has `steps` evenly spaced levels from `strength`, in (0, 1], down; or the levels of `timesteps`, 0..1000
    and decreasing. It is shifted as t' = shift t / (1 + (shift-1) t). The CPU `generator` draws the noise of lcm; use
    the one that drew the initial noise, because another one with the same seed would draw that noise again.

    Raises InputError for an unknown name, `steps` below 1, levels that do not decrease, and values out of range.
    """
    build = choose("solver", name, SOLVERS)
    if not shift > 0:
        raise InputError(f"the flow shift must be above 0, not {shift}")
    if not 0 < strength <= 1:
        raise InputError(f"the denoising strength must be above 0 and at most 1, not {strength}")
    highest = SIGMA_MAX_UNIPC if name == "unipc" else 1.0
    if len(timesteps):
        levels = np.minimum(explicit_levels(timesteps), highest)
    else:
        levels = even_levels(steps, strength * highest)
    shifted = shift * levels / (1 + (shift - 1) * levels)
    return build(np.append(shifted, 0.0), generator or torch.Generator().manual_seed(0))


def even_levels(steps: int, strength: float = 1.0) -> np.ndarray:
    """Return evenly spaced noise levels (steps,) from `strength` down to 0, exclusive. InputError below 1 step."""
    if steps < 1:
        raise InputError(f"the number of sampling steps must be at least 1, not {steps}")
    return np.linspace(strength, 0, steps + 1)[:-1]


def explicit_levels(timesteps: Sequence[float]) -> np.ndarray:
    """Return the noise levels in (0, 1] of timesteps 0..1000. Raises InputError unless they decrease."""
    levels = np.array(timesteps, dtype=np.float64) / NUM_TIMESTEPS
    if not (levels > 0).all() or not (levels <= 1).all() or not (np.diff(levels) < 0).all():
        given = ",".join(f"{value:g}" for value in timesteps)
        raise InputError(
            f"timesteps {given} must decrease from at most {NUM_TIMESTEPS} and stay above 0, such as 1000,750,500,250"
        )
    return levels
