"""Compile a model's blocks with torch.compile: one graph serves all blocks and all sequence lengths.

All blocks share a class, so torch caches the compiled code by the code object and reuses it for the other blocks;
parameters and buffers are inputs of the graph. Another graph is compiled where the guards of the first fail: without
gradients (previews), for the first block of a model that trains through an adapter (its input needs no gradient), for
batch size 1 beside larger ones, and at most twice for other batch sizes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from wan_train.compile_cache import describe_use, forget_counts, use_cache
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.placement.settings import CompileSettings

# Index and dimension of L of a block's arguments: x (B, L, d), rope (2, L, 1, D) and, in VACE's first block, start
# (B, L, d).
TOKENS = ((0, 1), (3, 1), (4, 1))
DYNAMIC = {"true": True, "false": False, "auto": None}
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes that use CUDA graphs

log = get_logger(__name__)


def apply_compile(
    blocks: Iterable[nn.Module], settings: CompileSettings, *, tokens: Sequence[tuple[int, int]] = TOKENS
) -> None:
    """Compile the forward pass of each block. Call this before anything else wraps the blocks.

    `tokens` are (argument, dimension) pairs whose size varies from batch to batch; with `compile_dynamic` auto the
    first graph is compiled with these dimensions dynamic. Nothing is compiled before the first call.
    """
    if not settings.compile:
        return
    _configure(settings.compile_cache_size_limit)
    vary = tokens if settings.compile_dynamic == "auto" else ()
    replays = settings.compile_mode in CUDA_GRAPHS
    for block in blocks:
        block.forward = _called(_compiled(block.forward, settings), vary, replays=replays)
        block.compiled = True  # type: ignore[assignment]


def is_compiled(block: nn.Module) -> bool:
    """Return whether `apply_compile` was applied to this block."""
    return getattr(block, "compiled", False)


@dataclass(frozen=True)
class Trial:
    """What `check_compile` tries besides a trivial function: Linears by the name of how their weights are stored, with
    inputs of `dtype`, and their backward pass if `training`."""

    linears: Mapping[str, nn.Linear] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    training: bool = False


def check_compile(
    settings: CompileSettings, *, device: torch.device | str, blocks_to_swap: int = 0, trial: Trial = Trial()
) -> None:
    """Compile a trivial function for `device` with these settings, and the Linears of the trial; use the settings'
    cache from then on.

    Raise InputError for unknown names, a compiler that does not work or cannot use the stored weights (on GPUs before
    compute capability 8.9 Triton has no e4m3), or settings that conflict with block swapping.
    """
    if not settings.compile:
        _warn_of_unused_options(settings)
        return
    _check_companions(settings, blocks_to_swap)
    if settings.compile_cache is not None:
        use_cache(settings.compile_cache)
    known = torch._dynamo.list_backends()
    if settings.compile_backend not in torch._dynamo.list_backends(exclude_tags=()):
        raise InputError(f"unknown --compile_backend {settings.compile_backend!r}: known are {', '.join(known)}")
    try:
        _compiled(_double, settings)(torch.zeros(2, device=device))
    except Exception as problem:  # compilers, drivers and packages raise all kinds of errors
        raise InputError(
            f"--compile does not work on {device} with --compile_backend {settings.compile_backend}"
            f" ({_line(problem)}): leave out --compile, or install what is missing"
        ) from None
    for stored, linear in trial.linears.items():
        _try_linear(linear, stored, settings, trial, torch.device(device))
    if settings.compile_cache is not None:
        forget_counts()  # of the trial compilation


def _try_linear(linear: nn.Linear, stored: str, settings: CompileSettings, trial: Trial, device: torch.device) -> None:
    def run(x: Tensor) -> Tensor:
        return linear(x)

    try:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(1, 32, linear.in_features, dtype=trial.dtype, device=device, requires_grad=trial.training)
            y = _compiled(run, settings)(x)
            if trial.training:
                y.sum().backward()
    except Exception as problem:
        raise InputError(
            f"--compile does not work on {device} with weights stored as {stored} ({_line(problem)}): leave out"
            " --compile, or store the weights in 16 bits"
        ) from None


def _warn_of_unused_options(settings: CompileSettings) -> None:
    names = [
        f.name for f in fields(settings) if f.name.startswith("compile_") and getattr(settings, f.name) != f.default
    ]
    if names:
        log.warning("--%s has no effect without --compile", names[0])


def log_cache_use(settings: CompileSettings) -> None:
    """Log, at the end of a run, whether `--compile_cache` was used."""
    if settings.compile and settings.compile_cache is not None:
        log.info("%s", describe_use(settings.compile_cache))


def _check_companions(settings: CompileSettings, blocks_to_swap: int) -> None:
    if settings.compile_cache is not None and settings.compile_backend != "inductor":
        raise InputError(
            f"--compile_cache {settings.compile_cache} caches what inductor compiles, not --compile_backend"
            f" {settings.compile_backend}: leave out one of them"
        )
    if settings.compile_mode != "default" and settings.compile_backend != "inductor":
        raise InputError(
            f"--compile_mode {settings.compile_mode} is a mode of inductor, not of --compile_backend"
            f" {settings.compile_backend}: leave out one of them"
        )
    if blocks_to_swap and settings.compile_mode in CUDA_GRAPHS:
        raise InputError(
            f"--compile_mode {settings.compile_mode} records the addresses of weights, which --blocks_to_swap"
            f" {blocks_to_swap} changes: use --compile_mode default or max-autotune-no-cudagraphs"
        )


def apply_device_flags(settings: CompileSettings) -> None:
    """Set the process-wide switches of torch."""
    if settings.cuda_allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if settings.cuda_cudnn_benchmark:
        torch.backends.cudnn.benchmark = True


def _configure(limit: int | None) -> None:
    """Configure torch._dynamo. These settings are global to the process."""
    config: Any = torch._dynamo.config
    # Under DDP it would split graphs at gradient buckets, and it fails on autograd functions. Blocks are small enough.
    config.optimize_ddp = False
    # Otherwise the forward pass saves the inputs of matrix products, including dequantised weights, for the backward
    # pass: that needs memory for the whole dequantised model.
    torch._functorch.config.ban_recompute_materialized_backward = False
    # Otherwise a Linear with a LoRA, which is added by a hook, may reuse the graph of one without.
    config.skip_nnmodule_hook_guards = False
    if limit is not None:
        config.recompile_limit = limit
        config.accumulated_recompile_limit = max(limit, config.accumulated_recompile_limit)


def _compiled(function: Callable[..., Any], settings: CompileSettings) -> Callable[..., Any]:
    return torch.compile(
        function,
        backend=settings.compile_backend,
        mode=settings.compile_mode,
        dynamic=DYNAMIC[settings.compile_dynamic],
        fullgraph=settings.compile_fullgraph,
    )


def _called(forward: Callable[..., Any], tokens: Sequence[tuple[int, int]], *, replays: bool) -> Callable[..., Any]:
    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        for argument, dimension in tokens:
            if argument < len(args):
                torch._dynamo.maybe_mark_dynamic(args[argument], dimension)
        out = forward(*args, **kwargs)
        # The output of a CUDA graph is overwritten by its next replay, that is by the next block.
        return tree_map(Tensor.clone, out) if replays else out

    return call


def _double(x: Tensor) -> Tensor:
    return x + x


def _line(problem: Exception) -> str:
    """Return the cause of a torch.compile error in one line, without its advice."""
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return " ".join(lines[: 2 if lines[0].endswith("raised:") else 1])[:200].rstrip(".")
