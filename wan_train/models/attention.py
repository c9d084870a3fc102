"""Attention backends, by name; each but torch's own is tried on the device before it is relied on.

Legend: B batch, L and S tokens, N heads, D head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from wan_train.cli import InputError, choose
from wan_train.log import get_logger
from wan_train.packages import first_line, load

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

HALF = (torch.float16, torch.bfloat16)
PROBE_TOKENS = (200, 77)  # of queries and of a text: no whole blocks of any kernel
PROBE_ERROR = 0.2  # relative; kernels in 8 bits err by a few hundredths, a broken one by ones

log = get_logger(__name__)


def attend_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v by torch's own kernels. query (B,L,N,D), key and value (B,S,N,D) -> (B,L,N,D)."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


def _as_it_is(operator: Callable[..., Any]) -> Attend:
    return operator


def _first(operator: Callable[..., Any]) -> Attend:
    """FlashAttention 3 returns the output alone or, in older builds, with the logarithm of its sums."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = operator(query, key, value)
        return out[0] if isinstance(out, tuple) else out

    return attend


def _among_equals(operator: Callable[..., Any]) -> Attend:
    """Sage where queries and keys are equally many: elsewhere builds of it err or give NaN (its issues 19 and 26).

    What is left to torch, attention to some hundred keys, is a hundredth of the time.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[1] != key.shape[1]:
            return attend_torch(query, key, value)
        return operator(query, key, value, tensor_layout="NHD")

    return attend


@dataclass(frozen=True)
class Backend:
    """Where an operator is and how it is called; without a module it is torch's own. The others take half precision."""

    module: str = ""
    function: str = ""
    package: str = ""  # as pip knows it
    install: str = ""  # where pip does not know it
    adapt: Callable[[Callable[..., Any]], Attend] = _as_it_is
    trains: bool = True


_FLASH2 = Backend("flash_attn", "flash_attn_func", "flash-attn")
BACKENDS: dict[str, Backend] = {
    "torch": Backend(),
    "sdpa": Backend(),
    "xformers": Backend("xformers.ops", "memory_efficient_attention", "xformers"),
    "flash": _FLASH2,
    "flash2": _FLASH2,
    "flash3": Backend(
        "flash_attn_interface",
        "flash_attn_func",
        "FlashAttention-3",
        "build it from the folder hopper of flash-attention",
        _first,
    ),
    "sageattn": Backend("sageattention", "sageattn", "sageattention", adapt=_among_equals, trains=False),
}


def attention(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    training: bool = False,
    split: bool = False,
    head_width: int = 128,
) -> Attend:
    """The backend called `name`, for tensors of `dtype` on `device`; `split` takes one sample of a batch at a time.

    Raises InputError for an unknown name, and for a backend that fails `check_attention`.
    """
    attend = check_attention(name, device=device, dtype=dtype, training=training, head_width=head_width)
    if BACKENDS[name].module and dtype not in HALF:
        log.info("--attn_mode %s has no kernels for %s: attention is taken in bfloat16", name, dtype)
    prefer_cudnn(torch.device(device))
    return _one_by_one(attend) if split else attend


def check_attention(
    name: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    training: bool,
    head_width: int = 128,
) -> Attend:
    """The backend called `name`, once it has run on `device`, in training backwards too. InputError if it cannot."""
    backend: Backend = choose("attention backend", name, BACKENDS)
    if training and not backend.trains:
        raise InputError(
            f"--attn_mode {name} cannot train, it has no backward pass: use --sdpa, --flash_attn or --xformers"
        )
    if not backend.module:
        return attend_torch
    attend = _in_half(_load(name, backend))
    seen = dtype if dtype in HALF else torch.bfloat16
    try:
        _probe(attend, torch.device(device), seen, head_width, training=training)
    except Exception as problem:  # kernels fail in every way there is: a missing operator, an assertion, a compiler
        raise InputError(f"--attn_mode {name} does not run on {device} ({first_line(problem)}): use --sdpa") from None
    return attend


def prefer_cudnn(device: torch.device) -> None:
    """On Hopper let torch try cuDNN's kernel first: it is of FlashAttention 3's speed there, torch's own choice is not.

    Set once for the process: a context manager around each call would cost time, and does not compile everywhere.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        order = torch._C._get_sdp_priority_order()
        cudnn = SDPBackend.CUDNN_ATTENTION.value
        torch._C._set_sdp_priority_order([cudnn, *(kernel for kernel in order if kernel != cudnn)])


def _load(name: str, backend: Backend) -> Attend:
    operator = load(
        backend.module,
        backend.function,
        f"--attn_mode {name}",
        package=backend.package,
        install=backend.install,
        instead="use --sdpa",
    )
    return backend.adapt(operator)


def _in_half(attend: Attend) -> Attend:
    """`attend` for inputs of any precision, by way of bfloat16."""

    def cast(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.dtype in HALF:
            return attend(query, key, value)
        half = torch.bfloat16
        return attend(query.to(half), key.to(half), value.to(half)).to(query.dtype)

    return cast


def _one_by_one(attend: Attend) -> Attend:
    """`attend` for one sample after the other: kernels that need memory beside their result need a sample's only."""

    def split(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        samples = zip(query.split(1), key.split(1), value.split(1), strict=True)
        return torch.cat([attend(*sample) for sample in samples])

    return split


def _probe(attend: Attend, device: torch.device, dtype: torch.dtype, head_width: int, *, training: bool) -> None:
    """Run on small tensors, tokens with themselves and with a text, and compare with torch. Raises whatever fails."""
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    num_queries, num_texts = PROBE_TOKENS
    for num_keys in (num_queries, num_texts):
        inputs = [
            torch.randn(1, count, 2, head_width, generator=generator).to(device, dtype).requires_grad_(training)
            for count in (num_queries, num_keys, num_keys)
        ]
        results = [_results(each, inputs, training=training) for each in (attend, attend_torch)]
        for ours, theirs in zip(*results, strict=True):
            error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
            if not error < PROBE_ERROR:
                raise RuntimeError(f"its results are off by {error:.2g} of their size")


def _results(attend: Attend, inputs: list[Tensor], *, training: bool) -> list[Tensor]:
    out = attend(*inputs)
    if not training:
        return [out]
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]
