"""From noise to latents: the one sampling loop, shared by previews and the generator."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wan_train.conditions import Conditions
from wan_train.flow.path import interpolate
from wan_train.flow.solvers import Solver, make_solver
from wan_train.sampling.guidance import Predict, StepPlan, guide, plan_steps
from wan_train.sampling.request import SampleRequest
from wan_train.sampling.text_memory import remembering_texts

CPU = torch.device("cpu")


def initial_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Noise (1, *shape) float32, on the CPU; a generator of the CPU draws the same on every machine."""
    return torch.randn(1, *shape, generator=generator, device=generator.device).cpu()


def seeded(seed: int, device: torch.device = CPU) -> torch.Generator:
    """A generator on a device."""
    return torch.Generator(device).manual_seed(seed)


def denoise(predict: Predict, solver: Solver, x: Tensor, plans: Sequence[StepPlan], *, quiet: bool) -> Tensor:
    """Noise led to latents. `predict(x, timestep, plan)` returns the velocity, on any device.

    The solver's arithmetic stays on the CPU in float32.
    """
    steps = list(zip(solver.timesteps, plans, strict=True))
    for timestep, plan in tqdm(steps, desc="sampling", disable=quiet, leave=False):
        x = solver.step(predict(x, timestep, plan).float().cpu(), timestep, x)
    return x


@torch.no_grad()
def sample_latents(
    model: nn.Module,
    request: SampleRequest,
    positive: Conditions,
    negative: Conditions,
    *,
    device: torch.device,
    source: Tensor | None = None,
    quiet: bool = False,
) -> Tensor:
    """Normalised latents (C, F, H, W) float32 of a request whose seed is set; of one frame of several that alone.

    With `source`, latents of that shape, the run begins at x = (1-t) source + t noise, with t the request's
    denoising strength after the shift.
    """
    assert request.seed is not None, "a request's seed is drawn before sampling"
    generator = seeded(request.seed)
    first = generator if request.rand_device == "cpu" or device.type == "cpu" else seeded(request.seed, device)
    noise = initial_noise(request.latent_shape, first)
    solver = make_solver(
        request.solver,
        steps=request.steps,
        shift=request.noise_shift,
        strength=1.0 if source is None else request.denoising_strength,
        timesteps=request.timesteps,
        generator=generator,
    )
    x = noise if source is None else interpolate(source.cpu().float()[None], noise, solver.sigmas[:1])
    predict = guide(model, positive, negative, request.guided, device=device)
    num_tokens = math.prod(request.latent_shape[1:]) // 4  # patches are 2 x 2
    with remembering_texts(model, num_tokens):
        latents = denoise(predict, solver, x, plan_steps(request.steps, request.guided), quiet=quiet)[0]
    if request.one_frame is None:
        return latents
    place = request.one_frame.target_place
    return latents[:, place : place + 1].clone()
