"""torch's scaled dot product attention, and which of its kernels may be used: each is tested on the device first.

Legend: B batch, L and S tokens, N heads, D head width.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan_train.log import get_logger
from wan_train.packages import first_line

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

PROBE_ERROR = 0.2  # relative; 8-bit kernels have errors of a few hundredths, a broken one errors of order 1

log = get_logger(__name__)


@dataclass(frozen=True)
class Probe:
    """Sizes of a test of attention, and an offset that is added to all of its scores."""

    num_queries: int
    num_keys: int
    shift: float = 0.0

    def inputs(self, device: torch.device, dtype: torch.dtype, head_width: int) -> list[Tensor]:
        """Return queries, keys and values (1, L or S, 2, D); does not affect the global random state."""
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(1, count, 2, head_width, generator=generator)
            for count in (self.num_queries, self.num_keys, self.num_keys)
        )
        if self.shift:
            query[..., 0], key[..., 0] = 1.0, self.shift * head_width**0.5
        return [tensor.to(device, dtype) for tensor in (query, key, value)]


# Self-attention, and cross-attention to the text and to the tokens of an image; the number of queries is no multiple of
# any kernel's block.
USUAL = (Probe(200, 200), Probe(200, 512), Probe(200, 257))
# Half a block of keys, and scores whose exponentials underflow in float32: cuDNN's backward pass has returned NaN here
# (pytorch issue 196678).
LOW_SCORES = (Probe(192, 192, shift=-120.0), Probe(200, 77, shift=-120.0))


@dataclass(frozen=True)
class Kernel:
    """One of torch's kernels, with the process-wide functions that query and set whether it is enabled."""

    name: str
    backend: SDPBackend
    is_on: Callable[[], bool]
    switch: Callable[[bool], None]


_FLASH = Kernel(
    "flash", SDPBackend.FLASH_ATTENTION, torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp
)
KERNELS: dict[str, tuple[Kernel, ...]] = {  # by device type; others are not tested
    "cuda": (
        Kernel(
            "cuDNN",
            SDPBackend.CUDNN_ATTENTION,
            torch.backends.cuda.cudnn_sdp_enabled,
            torch.backends.cuda.enable_cudnn_sdp,
        ),
        _FLASH,
        Kernel(
            "memory-efficient",
            SDPBackend.EFFICIENT_ATTENTION,
            torch.backends.cuda.mem_efficient_sdp_enabled,
            torch.backends.cuda.enable_mem_efficient_sdp,
        ),
    ),
}


def attend_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v from torch's kernels. query (B,L,N,D), key and value (B,S,N,D) -> (B,L,N,D)."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


def attend_by(backend: SDPBackend) -> Attend:
    """Return `attend_torch` restricted to one kernel; it raises RuntimeError for inputs that the kernel does not
    support."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attend_torch(query, key, value)

    return attend


def prefer_cudnn(device: torch.device) -> None:
    """On Hopper make torch try cuDNN's kernel first: it is as fast as FlashAttention 3, torch's default is not.

    Set once per process: a context manager around each call would cost time and does not compile everywhere.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        order = torch._C._get_sdp_priority_order()
        cudnn = SDPBackend.CUDNN_ATTENTION.value
        torch._C._set_sdp_priority_order([cudnn, *(kernel for kernel in order if kernel != cudnn)])


@lru_cache
def disable_faulty(device: torch.device, dtype: torch.dtype, head_width: int, *, training: bool) -> None:
    """Disable, with a warning, each of the device's `KERNELS` that differs from torch's math kernel or fails on such
    tensors, or in their backward pass if `training`.

    A few small calls for each kernel, once per process and combination of arguments.
    """
    for kernel in KERNELS.get(device.type, ()):
        fault = fault_of(kernel, device, dtype, head_width, training=training) if kernel.is_on() else None
        if fault is not None:
            kernel.switch(False)
            log.warning("torch's %s attention is disabled on %s for %s: %s", kernel.name, device, dtype, fault)


def fault_of(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, head_width: int, *, training: bool
) -> str | None:
    """Return a kernel's error in one line; None if it works or if torch would not select it."""
    probes = USUAL + LOW_SCORES if training else USUAL
    try:
        with warnings.catch_warnings():  # torch warns why a kernel does not support the inputs
            warnings.simplefilter("ignore")
            probe(attend_by(kernel.backend), probes, device, dtype, head_width, training=training)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # anything may fail: an assertion, an execution plan, a compiler
        line = first_line(problem)
        return None if line.startswith(("No available kernel", "No viable backend")) else line
    return None


def probe(
    attend: Attend,
    probes: Sequence[Probe],
    device: torch.device,
    dtype: torch.dtype,
    head_width: int,
    *,
    training: bool,
) -> None:
    """Run attention on small tensors and compare it with torch's math kernel in float32. Raises any error of the
    kernel."""
    for each in probes:
        with torch.inference_mode(False), torch.enable_grad():  # regardless of the caller's mode
            _probe_once(attend, each.inputs(device, dtype, head_width), training=training)


def _probe_once(attend: Attend, given: Sequence[Tensor], *, training: bool) -> None:
    inputs = [tensor.requires_grad_(training) for tensor in given]
    exact = [tensor.detach().float().requires_grad_(training) for tensor in given]
    theirs = _results(attend_by(SDPBackend.MATH), exact, training=training)
    for ours, right in zip(_results(attend, inputs, training=training), theirs, strict=True):
        if not ours.isfinite().all():
            raise RuntimeError("its results contain NaN or Inf")
        # The first element of a head carries the score offset: its gradient is rounding error only.
        error = float((ours.float() - right)[..., 1:].norm() / right[..., 1:].norm())
        if not error < PROBE_ERROR:
            raise RuntimeError(f"its results have a relative error of {error:.2g}")


def _results(attend: Attend, inputs: list[Tensor], *, training: bool) -> list[Tensor]:
    """Return the output and, in training, the gradients, through the layout (B, L, N*D) as in the model."""
    out = attend(*inputs)
    if not training:
        return [out]
    return [out.detach(), *torch.autograd.grad(out.flatten(2).float().square().sum(), inputs)]
