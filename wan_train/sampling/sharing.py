"""Divide one video among several processes: its tokens, and the passes of a step.

Legend: B batch, L tokens, S tokens of a share, N heads, D head width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wan_train.distributed.groups import Groups
from wan_train.distributed.ring import attend_in_ring
from wan_train.distributed.sequence import Layout, gather_shares, heads_for_tokens, take_share, tokens_for_heads
from wan_train.models.dit.attention import Attend
from wan_train.models.dit.dit import Dit, Embedded, RunBlocks, wrap_run_blocks
from wan_train.models.stacks import all_blocks


class Shared:
    """`Sharing` among the processes of `groups`: Ulysses and ring divide the tokens, CFG parallelism the passes.

    Every process has the same latents and inputs, and receives the same velocities.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._shape: list[int] | None = None  # of a velocity, known on both halves after the first exchange
        self._real: list[Tensor | None] = []  # of the current pass, see `_real_of_ring`
        self._attends: dict[Attend, Attend] = {}

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """Run the model's blocks on this process's share of the tokens inside the context."""
        self._shape = None
        if self._groups.tokens.size == 1 or not isinstance(model, Dit):
            yield
            return
        with wrap_run_blocks(model, self._sharing_tokens), self._attending(model):
            yield

    def together(self, passes: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Return the velocities of a step's passes, in order, on every process.

        The index of a pass determines its half, at every step, so state kept between steps is there. If there is only
        one pass, the other half waits.
        """
        cfg = self._groups.cfg
        if cfg.size == 1:
            return [run() for run in passes]
        own = {index: run() for index, run in enumerate(passes) if index % cfg.size == cfg.rank}
        device, shape = self._agreed_shape(own)
        out = []
        for index in range(len(passes)):
            velocity = own[index].contiguous() if index in own else torch.empty(shape, device=device)
            dist.broadcast(velocity, group=cfg.group, group_src=index % cfg.size)
            out.append(velocity)
        return out

    def _agreed_shape(self, own: dict[int, Tensor]) -> tuple[torch.device, list[int]]:
        """Return the device and the shape of velocities, which the second half may not have seen yet."""
        if self._shape is None:
            box: list[Any] = [list(own[0].shape) if 0 in own else None]
            dist.broadcast_object_list(box, group=self._groups.cfg.group, group_src=0)
            self._shape = box[0]
        assert self._shape is not None
        return self._groups.device, self._shape

    def _sharing_tokens(self, run: RunBlocks) -> RunBlocks:
        tokens = self._groups.tokens

        def run_share(state: Embedded) -> None:
            layout = Layout(state.tokens.shape[1], state.modulation.shape[1], tokens.size)
            whole_rope, self._real = state.rope, self._real_of_ring(layout, state.tokens.device)
            state.tokens = take_share(state.tokens, layout, tokens.rank)
            state.rope = take_share(state.rope, layout, tokens.rank)
            if state.vace is not None:
                state.vace.tokens = take_share(state.vace.tokens, layout, tokens.rank)
            run(state)
            state.tokens = gather_shares(state.tokens, layout, tokens)
            state.rope = whole_rope

        return run_share

    @contextmanager
    def _attending(self, model: Dit) -> Iterator[None]:
        """Let self-attention attend to the tokens of all processes inside the context."""
        attentions: list[Any] = [block.self_attn for block in all_blocks(model)]
        before = [attention.attend for attention in attentions]
        for attention, attend in zip(attentions, before, strict=True):
            if attend not in self._attends:  # kept, because a new function would recompile a compiled block
                self._attends[attend] = self._shared(attend)
            attention.attend = self._attends[attend]
        try:
            yield
        finally:
            for attention, attend in zip(attentions, before, strict=True):
                attention.attend = attend

    def _shared(self, attend: Attend) -> Attend:
        """Return `attend` for this process's share (B, S, N, D), computed on all tokens with a share of the heads."""
        ulysses, ring = self._groups.ulysses, self._groups.ring

        def attend_shared(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (heads_for_tokens(part, ulysses) for part in (query, key, value))
            if ring.size > 1:
                out = attend_in_ring(query, key, value, ring, self._real)
            else:
                if (real := self._real[0]) is not None:
                    key, value = key.index_select(1, real), value.index_select(1, real)
                out = attend(query, key, value)
            return tokens_for_heads(out, ulysses)

        return torch.compiler.disable(attend_shared)

    def _real_of_ring(self, layout: Layout, device: torch.device) -> list[Tensor | None]:
        """Return, for each rank of the ring, the tokens of its Ulysses group that are not padding; None means all."""
        ulysses, ring = self._groups.ulysses.size, self._groups.ring.size
        if not layout.is_padded:
            return [None] * ring
        return [layout.real(range(rank * ulysses, (rank + 1) * ulysses)).to(device) for rank in range(ring)]
