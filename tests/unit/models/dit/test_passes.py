"""A pass of the DiT is begin, run_blocks, finish; what shortens it wraps run_blocks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.unit.placement.blocks import CONFIG
from wan_train.models.dit.dit import Dit, Embedded, RunBlocks, wrap_run_blocks

TINY = replace(CONFIG, in_dim=4, out_dim=4, text_dim=8, freq_dim=8)


class Cache:
    """A toy step cache: every second pass adds what the blocks added in the one before."""

    def __init__(self) -> None:
        self.passes, self.computed = 0, 0
        self.change: Tensor | None = None

    def __call__(self, run: RunBlocks) -> RunBlocks:
        def cached(state: Embedded) -> None:
            self.passes += 1
            if self.passes % 2 == 0 and self.change is not None:
                state.tokens = state.tokens + self.change
                return
            before = state.tokens
            run(state)
            self.change, self.computed = state.tokens - before, self.computed + 1

        return cached


def test_a_step_cache_is_a_wrap() -> None:
    torch.manual_seed(0)
    model, cache = Dit(TINY), Cache()
    inputs = (torch.randn(1, 4, 2, 6, 8), torch.tensor([500.0]), torch.randn(1, 5, 8))
    with torch.no_grad():
        plain = model(*inputs)
        with wrap_run_blocks(model, cache):
            passes = [model(*inputs) for _ in range(4)]
        assert (cache.passes, cache.computed) == (4, 2)
        for latents in passes:
            torch.testing.assert_close(latents, plain)
        assert torch.equal(model(*inputs), plain) and cache.passes == 4


def test_wraps_nest_and_go_with_an_error() -> None:
    model, told = Dit(TINY), list[str]()

    def telling(name: str):  # type: ignore[no-untyped-def]
        def wrap(run: RunBlocks) -> RunBlocks:
            def told_of(state: Embedded) -> None:
                told.append(name)
                run(state)

            return told_of

        return wrap

    inputs = (torch.randn(1, 4, 1, 2, 2), torch.tensor([1.0]), torch.randn(1, 5, 8))
    with pytest.raises(KeyError), wrap_run_blocks(model, telling("outer")), wrap_run_blocks(model, telling("inner")):
        model(*inputs)
        raise KeyError
    assert told == ["inner", "outer"]
    model(*inputs)
    assert len(told) == 2 and "run_blocks" not in vars(model)
