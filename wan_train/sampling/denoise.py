"""The sampling loop from noise to latents, shared by previews and the generator."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wan_train.conditions.conditions import Conditions
from wan_train.conditions.control import dit_arguments
from wan_train.conditions.kinds import VACE_CONTEXT
from wan_train.conditions.vace import with_references
from wan_train.flow.path import interpolate
from wan_train.flow.solvers import make_solver
from wan_train.log import get_logger
from wan_train.models.dit.dit import Dit
from wan_train.models.dit.experts import expert_at
from wan_train.models.dit.rope import Riflex
from wan_train.placement.transfers import fetch
from wan_train.sampling.guidance import StepPlan, guide, plan_steps
from wan_train.sampling.passes import ALONE, Sharing, Wrap
from wan_train.sampling.request import SampleRequest
from wan_train.sampling.step_cache.caches import make_cache, make_schedule
from wan_train.sampling.step_cache.measure import Measurement, Recorder
from wan_train.sampling.step_cache.residuals import NoCache, StepCache
from wan_train.sampling.step_cache.schedule import Count, Phase
from wan_train.sampling.step_cache.settings import OFF
from wan_train.sampling.text_kv_cache import caching_text_kv
from wan_train.sampling.windows import log_length, sliding_windows, with_riflex

CPU = torch.device("cpu")

log = get_logger(__name__)


def initial_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return noise (1, *shape) float32 on the CPU; a CPU generator draws the same noise on every machine."""
    return torch.randn(1, *shape, generator=generator, device=generator.device).cpu()


def seeded(seed: int, device: torch.device = CPU) -> torch.Generator:
    """Return a seeded generator on a device."""
    return torch.Generator(device).manual_seed(seed)


class Sampling:
    """A sampling run from noise to latents, in which one expert may follow another.

    The solver works on the CPU in float32. The latent frames of VACE references precede those of the video until the
    end.
    """

    def __init__(
        self,
        request: SampleRequest,
        positive: Conditions,
        negative: Conditions,
        *,
        source: Tensor | None = None,
        sharing: Sharing = ALONE,
        measurement: Measurement | None = None,
        device: torch.device,
    ) -> None:
        """Start from noise or, with `source` latents (C, F, H, W), from x = (1-t) source + t noise.

        t is the denoising strength after the shift. The request must have a seed. With `measurement` all steps are
        computed, and the errors that reuse would cause are added to it.
        """
        assert request.seed is not None, "the request has no seed"
        generator = seeded(request.seed)
        first = generator if request.rand_device == "cpu" or device.type == "cpu" else seeded(request.seed, device)
        context = positive.extras.get(VACE_CONTEXT)
        channels, num_frames, *size = request.latent_shape
        self._num_before = 0 if context is None else context.shape[2] - num_frames
        noise = initial_noise((channels, self._num_before + num_frames, *size), first)
        if source is not None and context is not None:
            source = with_references(source.cpu()[None], context)[0]
        self.request, self.positive, self.negative, self.device = request, positive, negative, device
        self._sharing, self._measurement = sharing, measurement
        self.count: Count | None = None  # of passes, with a step cache
        log_length(request, num_frames, request.variant.trained_frames, num_before=self._num_before)
        self.solver = make_solver(
            request.solver,
            steps=request.steps,
            shift=request.noise_shift,
            strength=1.0 if source is None else request.denoising_strength,
            timesteps=request.timesteps,
            generator=generator,
        )
        start = self.solver.sigmas[:1]
        self._x = self._with_first(noise if source is None else interpolate(source.cpu().float()[None], noise, start))
        self._done = 0

    def experts(self) -> list[str | None]:
        """Return the experts of the remaining steps, in order; None stands for the only model of a task."""
        return list(dict.fromkeys(self._expert(timestep) for timestep in self.solver.timesteps[self._done :]))

    @torch.no_grad()
    def advance(
        self,
        model: nn.Module,
        expert: str | None = None,
        *,
        quiet: bool = False,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Run the next steps up to the first that needs another expert; `on_step` is called after each."""
        request = self.request
        guidance = request.guided(expert)
        positive = self._with_arguments()
        negative = replace(self.negative, extras=positive.extras)
        plans = plan_steps(request.steps, guidance, request.control_schedule)
        steps = list(itertools.takewhile(lambda step: self._expert(step[0]) == expert, self._coming(plans)))
        cache = self._cache(model, Phase([plan for _, plan in steps], guidance, request.steps))
        predict = guide(
            model,
            positive,
            negative,
            guidance,
            controls=request.control_schedule,
            wraps=(cache.wrap, *self._wraps()),
            sharing=self._sharing,
            device=self.device,
        )
        num_tokens = math.prod(request.latent_shape[1:]) // 4  # patches are 2 x 2
        with caching_text_kv(model, num_tokens), cache.around(model), self._sharing.around(model):
            for timestep, plan in tqdm(steps, desc=_words(expert), disable=quiet, leave=False):
                velocity = fetch(predict(self._x, timestep, plan).float())
                self._x = self._with_first(self.solver.step(velocity, timestep, self._x))
                self._done += 1
                on_step()
        if steps and self.count is not None and not self.experts():
            counts = request.step_cache, self.count.computed, self.count.reused
            log.info("step cache %s: %d passes computed, %d reused", *counts)

    @property
    def latents(self) -> Tensor:
        """The result, normalised latents (C, F, H, W) float32; in one-frame inference the target frame only."""
        assert not self.experts(), "steps remain"
        if self.request.one_frame is None:
            return self._x[0][:, self._num_before :]
        target = self.request.one_frame.target_place
        return self._x[0][:, target : target + 1].clone()

    def _cache(self, model: nn.Module, phase: Phase) -> StepCache:
        """Make the step cache of the request for the steps of one model, and log its schedule."""
        request = self.request
        if self._measurement is not None:
            return Recorder(self._measurement, phase, self.solver.sigmas)
        if request.step_cache == OFF or not phase.plans:
            return NoCache()
        assert isinstance(model, Dit)
        schedule = make_schedule(request, model, phase, self.solver.timesteps)
        self.count = (self.count or Count()) + schedule.count(phase)
        counts = schedule.num_computed_steps(phase), len(phase.plans)
        log.info("step cache %s: %d of %d steps computed", request.step_cache, *counts)
        return make_cache(request, schedule, self.solver.sigmas)

    def _wraps(self) -> list[Wrap]:
        """Return the wraps around each pass, the last outermost."""
        request = self.request
        wraps: list[Wrap] = []
        if request.riflex:
            wraps.append(with_riflex(Riflex(request.riflex_freq_index, request.variant.trained_frames)))
        if request.sliding_window_size is not None:
            size, stride = request.sliding_window_size, request.window_stride
            wraps.append(sliding_windows(size, stride, num_before=self._num_before))
        return wraps

    def _with_first(self, x: Tensor) -> Tensor:
        """Return x with the given first frame, if any, which the solver must not change."""
        first = self.positive.first_frame
        return x if first is None else torch.cat([first.cpu().to(x), x[:, :, 1:]], dim=2)

    def _with_arguments(self) -> Conditions:
        """Return the positive conditions as arguments of the DiT, on the device; the negative ones differ in the text.

        They are made for the duration of the steps only, because a camera's map is large.
        """
        shape = (1, *self.request.latent_shape)
        arguments = dit_arguments(self.positive.extras, self.request.variant, shape, device=self.device)
        return replace(self.positive, extras=arguments)

    def _coming(self, plans: Sequence[StepPlan]) -> list[tuple[Tensor, StepPlan]]:
        return list(zip(self.solver.timesteps, plans, strict=True))[self._done :]

    def _expert(self, timestep: Tensor) -> str | None:
        if self.request.variant.experts is None:
            return None
        return expert_at(float(timestep), self.request.expert_boundary)


def sample_latents(
    model: Any,
    request: SampleRequest,
    positive: Conditions,
    negative: Conditions,
    *,
    device: torch.device,
    source: Tensor | None = None,
    quiet: bool = False,
) -> Tensor:
    """Run `Sampling` to the end and return its latents; with two experts `model.of(expert)` must return each."""
    sampling = Sampling(request, positive, negative, source=source, device=device)
    for expert in sampling.experts():
        sampling.advance(model if expert is None else model.of(expert), expert, quiet=quiet)
    return sampling.latents


def _words(expert: str | None) -> str:
    return f"sampling, {expert.replace('_', ' ')}" if expert else "sampling"
