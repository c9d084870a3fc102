"""What replaces computation at a reused step: the residual of the block stack, or self-attention outputs."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wan_train.compile import is_compiled
from wan_train.errors import InputError
from wan_train.models.dit.dit import Dit, Embedded, RunBlocks, wrap_run_blocks
from wan_train.models.stacks import all_blocks
from wan_train.sampling.passes import Pass, PassName, Run
from wan_train.sampling.step_cache.schedule import LINEAR, Schedule
from wan_train.sampling.step_cache.settings import COMPILED


class StepCache(Protocol):
    """A step cache for the steps of one model: `wrap` wraps each pass, `around` replaces the model's blocks."""

    def wrap(self, run: Run) -> Run:
        """Return the pass, which is stored as the current one when it runs."""
        ...

    def around(self, model: nn.Module) -> AbstractContextManager[None]:
        """Replace blocks at reused steps inside the context.

        Enter it before anything else that wraps `run_blocks`, so that it sees this process's share of the tokens.
        """
        ...


class NoCache:
    """Computes every pass."""

    def wrap(self, run: Run) -> Run:
        """Return the pass unchanged."""
        return run

    def around(self, model: nn.Module) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()


class PassAware:
    """Stores the current pass."""

    current: Pass

    def wrap(self, run: Run) -> Run:
        """Return the pass, which is stored as the current one when it runs."""

        def noted(one: Pass) -> Tensor:
            self.current = one
            return run(one)

        return noted


class Residuals(PassAware):
    """Adds the residual of an earlier step (tokens after the blocks minus tokens before them) to the tokens.

    Residuals are float32, like the tokens: one per pass, or two for linear extrapolation over the noise level. `sigmas`
    (N+1,) are those of the request's steps. A reused step runs no block: none is streamed, and VACE computes no hints.
    """

    def __init__(self, schedule: Schedule, sigmas: Tensor) -> None:
        self._schedule, self._sigmas = schedule, sigmas.tolist()
        self._kept: dict[PassName, list[tuple[int, Tensor]]] = {}

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """Apply the schedule to every pass of the model inside the context."""
        assert isinstance(model, Dit)
        try:
            with wrap_run_blocks(model, self._reusing):
                yield
        finally:
            self._kept.clear()

    def _reusing(self, run: RunBlocks) -> RunBlocks:
        def reuse_or_run(state: Embedded) -> None:
            name, step = self.current.name, self.current.step
            order = self._schedule.order(name, step)
            if order is not None:
                state.tokens = state.tokens + extrapolated(self._kept[name], step, order, self._sigmas)
                if not self._schedule.is_awaited(name, step):
                    del self._kept[name]
            elif self._schedule.is_awaited(name, step):
                before = state.tokens
                run(state)
                self._keep(name, step, state.tokens - before)
            else:
                run(state)

        return reuse_or_run

    def _keep(self, name: PassName, step: int, residual: Tensor) -> None:
        num_kept = 2 if self._schedule.is_linear(name) else 1
        self._kept[name] = [*self._kept.get(name, []), (step, residual)][-num_kept:]


def extrapolated(known: Sequence[tuple[int, Tensor]], step: int, order: int, sigmas: Sequence[float]) -> Tensor:
    """Return the residual at a step, extrapolated from earlier (step, residual) pairs, newest last.

    It is the newest one, or for order LINEAR on the line through the newest two over sigma.
    """
    newest, residual = known[-1]
    if order != LINEAR:
        return residual
    older, before = known[-2]
    weight = (sigmas[step] - sigmas[older]) / (sigmas[newest] - sigmas[older])
    return torch.lerp(before, residual, weight)


class AttentionOutputs(PassAware):
    """Reuses the output of every block's self-attention; the rest of the block is computed.

    Outputs are kept in the compute dtype, one per block and pass.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._kept: dict[tuple[int, PassName], Tensor] = {}

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """Apply the schedule to every self-attention inside the context. Raises InputError for compiled blocks."""
        assert isinstance(model, Dit)
        blocks: list[Any] = list(all_blocks(model))
        if any(map(is_compiled, blocks)):
            raise InputError(COMPILED)
        with ExitStack() as stack:
            for index, block in enumerate(blocks):
                stack.enter_context(self._replacing(index, block.self_attn))
            try:
                yield
            finally:
                self._kept.clear()

    @contextmanager
    def _replacing(self, index: int, attention: nn.Module) -> Iterator[None]:
        before, computed = vars(attention).get("forward"), attention.forward

        def reuse_or_run(*inputs: Tensor) -> Tensor:
            name, step = self.current.name, self.current.step
            kept = self._kept.pop((index, name), None)
            out: Tensor = computed(*inputs) if self._schedule.order(name, step) is None or kept is None else kept
            if self._schedule.is_awaited(name, step):
                self._kept[index, name] = out
            return out

        vars(attention)["forward"] = reuse_or_run
        try:
            yield
        finally:
            if before is None:
                del vars(attention)["forward"]
            else:
                vars(attention)["forward"] = before
