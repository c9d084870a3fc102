"""A tiny DiT with texts, the passes of a run in it as they happen, and a sampling loop written out by hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from wan_train.conditions.conditions import Conditions
from wan_train.flow.solvers import make_solver
from wan_train.models.dit.dit import Dit, DitConfig, Embedded, RunBlocks, wrap_run_blocks
from wan_train.sampling.denoise import initial_noise, sample_latents, seeded
from wan_train.sampling.request import SampleRequest

CPU = torch.device("cpu")
TEXTS = {
    name: torch.randn(5, 8, generator=torch.Generator().manual_seed(i))
    for i, name in enumerate(("positive", "negative"))
}
POSITIVE, NEGATIVE = (Conditions((rows,)) for rows in TEXTS.values())
STEPS, GUIDANCE = 12, 3.0


def tiny_dit(seed: int = 0, **changes: Any) -> Dit:
    """A DiT of three blocks that computes in float32."""
    torch.manual_seed(seed)
    config = DitConfig(**({"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 3, "text_dim": 8} | changes))
    model = Dit(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.15)
    return model


def request(**changes: Any) -> SampleRequest:
    """A guided run of STEPS steps of Euler over (16, 2, 2, 4) latents."""
    plain = SampleRequest("a", "b", 32, 16, 5, STEPS, GUIDANCE, 3.0, seed=3, solver="euler")
    return replace(plain, **changes)


def sample(model: Dit, wanted: SampleRequest) -> Tensor:
    """The latents (C, F, H, W) of a request."""
    return sample_latents(model, wanted, POSITIVE, NEGATIVE, device=CPU, quiet=True)


@contextmanager
def watched(model: Dit) -> Iterator[list[bool]]:
    """While it lasts, note of each pass whether its blocks ran."""
    passes: list[bool] = []
    begin = model.begin

    def begun(*inputs: Any, **more: Any) -> Embedded:
        passes.append(False)
        return begin(*inputs, **more)

    def noting(run: RunBlocks) -> RunBlocks:
        def noted(state: Embedded) -> None:
            passes[-1] = True
            run(state)

        return noted

    vars(model)["begin"] = begun
    try:
        with wrap_run_blocks(model, noting):
            yield passes
    finally:
        del vars(model)["begin"]


Blocks = Callable[[int, str, Embedded], bool]


@dataclass
class ByHand:
    """A guided run, pass by pass: `blocks(step, prompt, state)` sends the tokens through, and says whether it computed
    them. `residuals` are for it to keep things in; `latents` is what the run came to, `computed` what it said."""

    model: Dit
    blocks: Blocks
    computed: list[bool] = field(default_factory=list)
    latents: Tensor = field(default_factory=lambda: torch.empty(0))

    def run(self, wanted: SampleRequest) -> "ByHand":
        """Euler over the request's steps, both prompts at each."""
        solver = make_solver("euler", steps=wanted.steps, shift=wanted.noise_shift)
        x = initial_noise(wanted.latent_shape, seeded(3))
        for step, timestep in enumerate(solver.timesteps):
            velocities = []
            for prompt, text in TEXTS.items():
                state = self.model.begin(x, timestep.expand(1).float(), [text])
                self.computed.append(self.blocks(step, prompt, state))
                velocities.append(self.model.finish(state))
            positive, negative = velocities
            x = solver.step(negative + wanted.guidance * (positive - negative), timestep, x)
        self.latents = x[0]
        return self
