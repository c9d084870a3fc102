"""Compile the elementwise work of a DiT's blocks on a GPU: each function of `models.dit.fused` becomes one kernel.

Compiling these small functions takes seconds, and works beside everything that wraps blocks or Linears. Blocks that are
compiled whole need none of it.
"""

from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from wan_train.log import get_logger
from wan_train.models.dit.block import Block
from wan_train.models.dit.dit import Dit
from wan_train.models.dit.fused import PURE, Fused, Kernels
from wan_train.models.dit.norms import RMSNorm
from wan_train.models.stacks import all_blocks
from wan_train.packages import first_line
from wan_train.placement.settings import CompileSettings

WITH_COMPILER = ("cuda", "xpu")  # types of devices for which inductor generates kernels by itself
PROBE_ERROR = 0.05  # relative; rounding to bfloat16 gives a few thousandths, a wrong kernel errors of order 1

log = get_logger(__name__)


def apply_fusing(model: Dit, settings: CompileSettings, device: torch.device) -> None:
    """Let all blocks compute their elementwise work with compiled kernels if the device has a compiler that works.

    This changes rounding, not results. Nothing changes with `compile`, which compiles blocks whole, with
    `no_fused_kernels`, and on CPUs, where torch's operators are as fast.
    """
    if settings.compile or settings.no_fused_kernels or device.type not in WITH_COMPILER:
        return
    kernels = working_kernels(device, model.config.dim, model.config.num_heads)
    if kernels is not None:
        set_kernels(all_blocks(model), kernels)


def set_kernels(blocks: Iterable[nn.Module], kernels: Kernels) -> None:
    """Let the blocks compute their elementwise work with these kernels."""
    fused = Fused(kernels)
    for block in blocks:
        for part in block.modules():
            if isinstance(part, Block):
                part.elementwise = fused
            elif isinstance(part, RMSNorm):
                part.norm_rope = fused.norm_rope


@cache
def working_kernels(device: torch.device, width: int, num_heads: int) -> Kernels | None:
    """Compile the kernels and compare them with torch's operators on the device; None, with a warning, if one fails."""
    kernels = PURE.each(compiled)
    try:
        with torch.inference_mode(False), torch.no_grad():
            for name, arguments in examples(device, torch.bfloat16, width, num_heads).items():
                _compare(name, getattr(kernels, name)(*arguments), getattr(PURE, name)(*arguments))
    except Exception as problem:  # compilers, drivers and packages raise all kinds of errors
        log.warning(
            "norms and residual sums run as separate, slower operators: compiling kernels for %s does not work (%s)",
            device,
            first_line(problem),
        )
        return None
    log.info("norms and residual sums run as compiled kernels (--no_fused_kernels: as separate operators)")
    return kernels


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled for any numbers of tokens and of groups, which are dimension 1 of its tensors.

    The width stays a constant of the code. Detached tensors let passes with and without gradients share it.
    """
    fast = torch.compile(function, dynamic=False)

    @wraps(function)
    def call(*args: Any) -> Any:
        args = tuple(value.detach() if isinstance(value, Tensor) else value for value in args)
        for value in args:
            if isinstance(value, Tensor) and value.ndim > 2:
                torch._dynamo.maybe_mark_dynamic(value, 1)
        return fast(*args)

    return call


def examples(
    device: torch.device, dtype: torch.dtype, width: int = 128, num_heads: int = 2
) -> dict[str, tuple[Any, ...]]:
    """Return small arguments of each kernel: 24 tokens in three groups."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, grad, weight, rope = draw(1, 24, width), draw(1, 24, width), draw(width), draw(2, 24, 1, width // num_heads)
    update, heads = draw(1, 24, width).to(dtype), draw(1, 24, num_heads, width // num_heads).to(dtype)
    scale, shift, gate = (draw(1, 3, width) for _ in range(3))
    mean, inverse = draw(1, 24, 1), draw(1, 24, 1).abs()
    return {
        "norm_and_rotate": (update, weight, rope, 1e-6, num_heads),
        "norm_and_rotate_backward": (heads, update, weight, rope, inverse),
        "normalise": (x, scale, shift, 1.0, 1e-6, dtype),
        "normalise_backward": (update, x, scale, 1.0, mean, inverse),
        "add": (x, update, gate),
        "add_backward": (grad, gate, dtype),
        "add_normalise": (x, update, gate, scale, shift, 1.0, 1e-6, dtype),
        "add_normalise_backward": (grad, update, x, gate, scale, 1.0, mean, inverse),
    }


def _compare(name: str, results: Any, expected: Any) -> None:
    """Raise RuntimeError if results, a tensor or several, differ from those expected by more than rounding."""
    pairs = [(results, expected)] if isinstance(results, Tensor) else zip(results, expected, strict=True)
    for result, right in pairs:
        error = float((result.float() - right.float()).norm() / right.float().norm())
        if not error < PROBE_ERROR:
            raise RuntimeError(f"{name} has a relative error of {error:.2g}")
