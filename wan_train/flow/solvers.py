"""Solvers of the sampling ODE: diffusers' steps on the official sigma grids.

The step formulas are diffusers' (UniPC, Zhao et al. 2023; DPM-Solver++, Lu et al. 2022; Euler). Which noise levels they
visit is decided here, as the official Wan sampler decides it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan_train.cli import InputError, choose
from wan_train.flow.timesteps import NUM_TIMESTEPS

SIGMA_MAX_UNIPC = 0.999  # the official table starts one of its 1000 steps below pure noise


class Solver:
    """One run from noise to data over a fixed grid.

    `sigmas` (N+1,) float32, noise levels from about 1 to 0; `timesteps` (N,), what the DiT is told at each step.
    """

    def __init__(self, scheduler: Any, sigmas: np.ndarray, timesteps: np.ndarray) -> None:
        self._scheduler = scheduler
        scheduler.set_timesteps(len(timesteps), device="cpu")
        scheduler.sigmas = torch.from_numpy(sigmas.astype(np.float32))
        scheduler.timesteps = torch.from_numpy(timesteps)
        scheduler.num_inference_steps = len(timesteps)
        # Truncated timesteps can repeat; a search for the first of them would start at its twin.
        scheduler.set_begin_index(0)

    @property
    def sigmas(self) -> Tensor:
        return self._scheduler.sigmas

    @property
    def timesteps(self) -> Tensor:
        return self._scheduler.timesteps

    def step(self, velocity: Tensor, timestep: Tensor, x: Tensor) -> Tensor:
        """x at the next noise level, from the model's velocity at this one; the steps must be taken in order."""
        return self._scheduler.step(velocity, timestep, x, return_dict=False)[0]


def _shifted(start: float, steps: int, factor: float) -> np.ndarray:
    grid = np.linspace(start, 0, steps + 1)[:-1]
    return factor * grid / (1 + (factor - 1) * grid)


def _unipc(steps: int, factor: float) -> Solver:
    from diffusers import UniPCMultistepScheduler

    sigmas = np.append(_shifted(SIGMA_MAX_UNIPC, steps, factor), 0.0)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, solver_type="bh2"
    )
    return Solver(scheduler, sigmas, (NUM_TIMESTEPS * sigmas[:-1]).astype(np.int64))


def _dpmpp(steps: int, factor: float) -> Solver:
    from diffusers import DPMSolverMultistepScheduler

    sigmas = np.append(_shifted(1.0, steps, factor), 0.0)
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="dpmsolver++", solver_type="midpoint"
    )
    return Solver(scheduler, sigmas, (NUM_TIMESTEPS * sigmas[:-1]).astype(np.int64))


def _euler(steps: int, factor: float) -> Solver:
    from diffusers import FlowMatchEulerDiscreteScheduler

    sigmas = np.append(_shifted(1.0, steps, factor), 0.0)
    return Solver(FlowMatchEulerDiscreteScheduler(), sigmas, (NUM_TIMESTEPS * sigmas[:-1]).astype(np.float32))


SOLVERS: dict[str, Callable[[int, float], Solver]] = {
    "unipc": _unipc,
    "dpm++": _dpmpp,
    "euler": _euler,
    "vanilla": _euler,
}


def make_solver(name: str, *, steps: int, shift: float) -> Solver:
    """The solver `name` ("unipc", "dpm++", "euler" also called "vanilla") over `steps` steps of the shifted grid.

    Raises InputError for an unknown name, `steps` below 1 or a `shift` that is not positive.
    """
    build = choose("solver", name, SOLVERS)
    if steps < 1:
        raise InputError(f"a solver takes at least 1 step, not {steps}")
    if not shift > 0:
        raise InputError(f"the flow shift must be above 0, not {shift}")
    return build(steps, shift)
