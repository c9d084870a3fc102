"""Activation checkpointing: recompute the activations of a block in the backward pass to save memory."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from wan_train.cli import choose
from wan_train.placement.lanes import Lane, make_lane
from wan_train.placement.offload import Call, Kept, Offload
from wan_train.placement.settings import RecomputeSettings
from wan_train.placement.spare import LeavingOut, is_spare, mark_last_product

# Attention operators, whose first output is the attention result. An operator missing here is recomputed: correct, but
# no faster than "full".
ATTENTION_KERNELS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
        "aten::_cudnn_attention_forward",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::_flash_attn_forward",
        "flash_attn_3::fwd",
        "xformers::efficient_attention_forward_cutlass",
        "xformers_flash::flash_fwd",
        "xformers_flash3::flash_fwd",
    }
)

Forward = Callable[..., Tensor]
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def apply_recompute(
    blocks: Iterable[nn.Module], settings: RecomputeSettings, device: torch.device, lane: Lane | None = None
) -> None:
    """Set which activations of each block are kept for the backward pass.

    "none" keeps all activations; "full" keeps only a block's input and runs its forward pass again; "keep_attention"
    also keeps the outputs of attention, which are then not recomputed. A block's first argument is its own; other
    arguments are shared by all blocks and kept without a copy. With `gradient_checkpointing_cpu_offload` kept tensors
    are offloaded to CPU RAM (through `lane`, default: the device's lane), except attention's log-sum-exp, one value per
    token and head. The recomputation uses the same random numbers. Set attention backends and everything else inside a
    block (compilation, streaming) before. Unless the block is compiled, the recomputation skips its last matrix product
    (`wan_train.placement.spare`).
    """
    contexts_of = choose("recompute mode", settings.recompute, MODES)
    if contexts_of is None:
        return
    offload = Offload(lane or make_lane(device)) if settings.gradient_checkpointing_cpu_offload else None
    for block in blocks:
        if settings.recompute == "keep_attention":
            _keep_attention(block)
        mark_last_product(block)
        block.forward = _recomputed(block, contexts_of, offload)


def _nothing(call: Call | None, *, spare: bool) -> Contexts:
    return nullcontext(), LeavingOut(spare=spare)


def _attention(call: Call | None, *, spare: bool) -> Contexts:
    kernels = _Kernels(call)
    return _During(kernels, again=False), _Both(_During(kernels, again=True), LeavingOut(spare=spare))


MODES: dict[str, Callable[..., Contexts] | None] = {
    "none": None,
    "full": _nothing,
    "keep_attention": _attention,
}


def _recomputed(block: nn.Module, contexts_of: Callable[..., Contexts], offload: Offload | None) -> Forward:
    forward = block.forward

    @wraps(forward)
    def recomputed(x: Tensor, *shared: Any, **named: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(x, *shared, **named)

        def run(x: Tensor) -> Tensor:
            return forward(x, *shared, **named)

        call = offload.begin() if offload else None
        with _moved(x.shape, call) if call else nullcontext():
            contexts = partial(contexts_of, call, spare=is_spare(block, shared))
            return cast(Tensor, checkpoint(run, x, use_reentrant=False, context_fn=contexts))

    return recomputed


def _moved(shape: torch.Size, call: Call) -> saved_tensors_hooks:
    """Offload tensors of this shape, a checkpoint's input, within the context; `call` keeps them."""

    def pack(tensor: Tensor) -> Tensor | Kept:
        return call.keep(tensor) if tensor.shape == shape else tensor

    def unpack(packed: Tensor | Kept) -> Tensor:
        return call.take(packed) if isinstance(packed, Kept) else packed

    return saved_tensors_hooks(pack, unpack)


class _Kernels(TorchDispatchMode):
    """Outputs of the attention operators of one call of a block: recorded in the first pass and reused in the second.

    Dispatch is below autograd, so in the second pass their backward is recorded as usual, without the computation.
    """

    def __init__(self, call: Call | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.call = call
        self.results: list[Any] = []
        self.again = False
        self.position = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().partition(".")[0] not in ATTENTION_KERNELS:
            return func(*args, **(kwargs or {}))
        if not self.again:
            result = func(*args, **(kwargs or {}))
            self.results.append(self._pack(result))
            return result
        self.position += 1
        return self._unpack(self.results[self.position - 1])

    def _pack(self, result: Any) -> list[Any]:
        # Autograd attaches the graph to the returned tensors, so detached ones are kept.
        first, *rest = [part.detach() if isinstance(part, Tensor) else part for part in result]
        return [self.call.keep(first) if self.call else first, *rest]

    def _unpack(self, packed: list[Any]) -> tuple[Any, ...]:
        first, *rest = packed
        if self.call:
            first = self.call.take(first)
        return tuple(part.detach() if isinstance(part, Tensor) else part for part in (first, *rest))


_current: ContextVar[_Kernels | None] = ContextVar("attention kernels of the current block", default=None)


class _During:
    """One pass of a block, with the outputs of its attention kernels recorded or reused."""

    def __init__(self, kernels: _Kernels, *, again: bool) -> None:
        self.kernels, self.again = kernels, again

    def __enter__(self) -> None:
        self.kernels.again, self.kernels.position = self.again, 0
        self.token = _current.set(self.kernels)

    def __exit__(self, *_: object) -> None:
        _current.reset(self.token)


class _Both:
    """Two nested context managers as one."""

    def __init__(self, *parts: AbstractContextManager[Any]) -> None:
        self._parts, self._entered = parts, ExitStack()

    def __enter__(self) -> None:
        for part in self._parts:
            self._entered.enter_context(part)

    def __exit__(self, *_: object) -> None:
        self._entered.close()


def _keep_attention(block: nn.Module) -> None:
    """Make the block's attentions use `_current`. Only those, because a dispatch mode slows every operator."""
    for part in block.modules():
        if hasattr(part, "attend"):
            cast(Any, part).attend = _with_kernels(cast(Any, part).attend)


def _with_kernels(attend: Forward) -> Forward:
    @wraps(attend)
    def attend_with_kernels(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kernels = _current.get()
        if kernels is None:
            return attend(query, key, value)
        with kernels:
            return attend(query, key, value)

    # Excluded from compiled graphs, in which a dispatch mode does not see the operators.
    return cast(Forward, torch.compiler.disable(attend_with_kernels))
