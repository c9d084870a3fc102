"""torch's own attention, and which of its kernels it may take: each is tried on the device before it is relied on.

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

PROBE_ERROR = 0.2  # relative; kernels in 8 bits err by a few hundredths, a broken one by ones

log = get_logger(__name__)


@dataclass(frozen=True)
class Probe:
    """How many queries and keys an attention is tried on, and about what all of its scores are moved by."""

    num_queries: int
    num_keys: int
    shift: float = 0.0

    def inputs(self, device: torch.device, dtype: torch.dtype, head_width: int) -> list[Tensor]:
        """Queries, keys and values (1, L or S, 2, D); the run's own random numbers stay as they are."""
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(1, count, 2, head_width, generator=generator)
            for count in (self.num_queries, self.num_keys, self.num_keys)
        )
        if self.shift:
            query[..., 0], key[..., 0] = 1.0, self.shift * head_width**0.5
        return [tensor.to(device, dtype) for tensor in (query, key, value)]


# Tokens with themselves and with a text: no whole blocks of any kernel.
USUAL = (Probe(200, 200), Probe(200, 77))
# Half a block of keys beside scores whose exponentials vanish in float32: here cuDNN's backward pass has given NaN
# (pytorch issue 196678).
LOW_SCORES = (Probe(192, 192, shift=-120.0), Probe(200, 77, shift=-120.0))


@dataclass(frozen=True)
class Kernel:
    """One of torch's kernels and its switch, which holds for the whole process."""

    name: str
    backend: SDPBackend
    is_on: Callable[[], bool]
    switch: Callable[[bool], None]


_FLASH = Kernel(
    "flash", SDPBackend.FLASH_ATTENTION, torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp
)
KERNELS: dict[str, tuple[Kernel, ...]] = {  # by kind of device; its math kernel is what they are held against
    "cpu": (_FLASH,),
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
    """softmax(q k^T / sqrt(D)) v by torch's own kernels. query (B,L,N,D), key and value (B,S,N,D) -> (B,L,N,D)."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


def attend_by(backend: SDPBackend) -> Attend:
    """`attend_torch` by this kernel alone. RuntimeError where it does not take the inputs."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attend_torch(query, key, value)

    return attend


def prefer_cudnn(device: torch.device) -> None:
    """On Hopper let torch try cuDNN's kernel first: it is of FlashAttention 3's speed there, torch's own choice is not.

    Set once for the process: a context manager around each call would cost time, and does not compile everywhere.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        order = torch._C._get_sdp_priority_order()
        cudnn = SDPBackend.CUDNN_ATTENTION.value
        torch._C._set_sdp_priority_order([cudnn, *(kernel for kernel in order if kernel != cudnn)])


@lru_cache
def disable_faulty(device: torch.device, dtype: torch.dtype, head_width: int, *, training: bool) -> None:
    """Switch off each of torch's kernels that fails on such tensors, in training backwards too, and say so."""
    for kernel in KERNELS.get(device.type, ()):
        fault = fault_of(kernel, device, dtype, head_width, training=training) if kernel.is_on() else None
        if fault is not None:
            kernel.switch(False)
            log.info("torch's %s attention is disabled on %s for %s: %s", kernel.name, device, dtype, fault)


def fault_of(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, head_width: int, *, training: bool
) -> str | None:
    """What is wrong with a kernel, in one line; None for one that works, and for one that torch would not take."""
    probes = USUAL + LOW_SCORES if training else USUAL
    try:
        with warnings.catch_warnings():  # torch warns of why a kernel does not take the inputs
            warnings.simplefilter("ignore")
            probe(attend_by(kernel.backend), probes, device, dtype, head_width, training=training)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # kernels fail in every way there is: an assertion, an execution plan, a compiler
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
    """Run on small tensors and compare with torch's math kernel in float32. Raises whatever fails."""
    for each in probes:
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
            _probe_once(attend, each.inputs(device, dtype, head_width), training=training)


def _probe_once(attend: Attend, given: Sequence[Tensor], *, training: bool) -> None:
    inputs = [tensor.requires_grad_(training) for tensor in given]
    exact = [tensor.detach().float().requires_grad_(training) for tensor in given]
    theirs = _results(attend_by(SDPBackend.MATH), exact, training=training)
    for ours, right in zip(_results(attend, inputs, training=training), theirs, strict=True):
        if not ours.isfinite().all():
            raise RuntimeError("its results contain NaN or Inf")
        # The first number of a head is what moves the scores: of its gradient, rounding alone is left.
        error = float((ours.float() - right)[..., 1:].norm() / right[..., 1:].norm())
        if not error < PROBE_ERROR:
            raise RuntimeError(f"its results have a relative error of {error:.2g}")


def _results(attend: Attend, inputs: list[Tensor], *, training: bool) -> list[Tensor]:
    """The output and, in training, the gradients, by way of a layout (B, L, N*D) as in the model."""
    out = attend(*inputs)
    if not training:
        return [out]
    return [out.detach(), *torch.autograd.grad(out.flatten(2).float().square().sum(), inputs)]
