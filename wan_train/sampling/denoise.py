"""From noise to latents: the one sampling loop, shared by previews and the generator."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wan_train.conditions import Conditions
from wan_train.flow.solvers import Solver, make_solver
from wan_train.sampling.guidance import guided_steps
from wan_train.sampling.request import SampleRequest

Predict = Callable[[Tensor, Tensor, bool], Tensor]


def initial_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Noise (1, *shape) float32 from a generator on the CPU: the same on every machine."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def denoise(predict: Predict, solver: Solver, noise: Tensor, guided: Sequence[bool], *, quiet: bool) -> Tensor:
    """Noise led to latents. `predict(x, timestep, with guidance?)` returns the velocity, on any device.

    The solver's arithmetic stays on the CPU in float32.
    """
    x = noise
    steps = list(zip(solver.timesteps, guided, strict=True))
    for timestep, with_guidance in tqdm(steps, desc="sampling", disable=quiet, leave=False):
        x = solver.step(predict(x, timestep, with_guidance).float().cpu(), timestep, x)
    return x


def guide(model: nn.Module, positive: Conditions, negative: Conditions, scale: float, device: torch.device) -> Predict:
    """The guided velocity v_n + scale (v_p - v_n); at scale 1 it is v_p, for one pass instead of two."""
    positive, negative = positive.to(device), negative.to(device)

    def predict(x: Tensor, timestep: Tensor, with_guidance: bool) -> Tensor:
        latents, time = x.to(device), timestep.to(device).view(1)
        conditioned: Tensor = model(latents, time, **positive.inputs())
        if not with_guidance or scale == 1:
            return conditioned
        unconditioned: Tensor = model(latents, time, **negative.inputs())
        return unconditioned + scale * (conditioned - unconditioned)

    return predict


@torch.no_grad()
def sample_latents(
    model: nn.Module,
    request: SampleRequest,
    positive: Conditions,
    negative: Conditions,
    *,
    device: torch.device,
    quiet: bool = False,
) -> Tensor:
    """Normalised latents (C, F, H, W) float32 of a request whose seed is set."""
    assert request.seed is not None, "a request's seed is drawn before sampling"
    solver = make_solver(request.solver, steps=request.steps, shift=request.shift)
    guided = guided_steps(request.steps, request.cfg_skip_mode, request.cfg_apply_ratio)
    predict = guide(model, positive, negative, request.guidance, device)
    noise = initial_noise(request.latent_shape, request.seed)
    return denoise(predict, solver, noise, guided, quiet=quiet)[0]
