"""Attention backends, by name; each is tested on the device before it is used.

Legend: B batch, L and S tokens, N heads, D head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wan_train.cli import choose
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.dit.kernels import USUAL, disable_faulty, prefer_cudnn, probe
from wan_train.models.dit.kernels import Attend as Attend
from wan_train.models.dit.kernels import attend_torch as attend_torch
from wan_train.packages import first_line, load

HALF = (torch.float16, torch.bfloat16)

log = get_logger(__name__)


def _unchanged(operator: Callable[..., Any]) -> Attend:
    return operator


def _output_only(operator: Callable[..., Any]) -> Attend:
    """Adapt FlashAttention 3, which returns the output alone or, in older builds, (output, log-sum-exp)."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = operator(query, key, value)
        return out[0] if isinstance(out, tuple) else out

    return attend


def _equal_lengths_only(operator: Callable[..., Any]) -> Attend:
    """Use SageAttention for equally many queries and keys only; otherwise builds of it fail or return NaN (issues 19
    and 26).

    Other attention, to a few hundred keys, is left to torch and is about a hundredth of the time.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[1] != key.shape[1]:
            return attend_torch(query, key, value)
        return operator(query, key, value, tensor_layout="NHD")

    return attend


@dataclass(frozen=True)
class Backend:
    """Where an operator is found and how it is called. Without a module it is torch's; others need half precision."""

    module: str = ""
    function: str = ""
    package: str = ""  # name for pip
    install: str = ""  # instructions if it is not on PyPI
    adapt: Callable[[Callable[..., Any]], Attend] = _unchanged
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
        _output_only,
    ),
    "sageattn": Backend("sageattention", "sageattn", "sageattention", adapt=_equal_lengths_only, trains=False),
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
    """Return the backend `name` for tensors of `dtype` on `device`; with `split` it processes one sample at a time.

    Raises InputError for an unknown name, and for a backend that fails `check_attention`.
    """
    attend = check_attention(name, device=device, dtype=dtype, training=training, head_width=head_width)
    if BACKENDS[name].module and dtype not in HALF:
        log.info("--attn_mode %s has no kernels for %s: using bfloat16 for attention", name, dtype)
    prefer_cudnn(torch.device(device))
    disable_faulty(torch.device(device), dtype, head_width, training=training)
    return _per_sample(attend) if split else attend


def check_attention(
    name: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    training: bool,
    head_width: int = 128,
) -> Attend:
    """Return the backend `name` after a test run on `device`, with a backward pass if `training`.

    Raises InputError if it does not work.
    """
    backend: Backend = choose("attention backend", name, BACKENDS)
    if training and not backend.trains:
        raise InputError(
            f"--attn_mode {name} does not support training (no backward pass): use --sdpa, --flash_attn or --xformers"
        )
    if not backend.module:
        return attend_torch
    attend = _in_half(_load(name, backend))
    seen = dtype if dtype in HALF else torch.bfloat16
    try:
        probe(attend, USUAL, torch.device(device), seen, head_width, training=training)
    except Exception as problem:  # kernels fail in every way there is: a missing operator, an assertion, a compiler
        raise InputError(f"--attn_mode {name} does not run on {device} ({first_line(problem)}): use --sdpa") from None
    return attend


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
    """Wrap `attend` to accept inputs of any precision by casting to bfloat16."""

    def cast(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.dtype in HALF:
            return attend(query, key, value)
        half = torch.bfloat16
        return attend(query.to(half), key.to(half), value.to(half)).to(query.dtype)

    return cast


def _per_sample(attend: Attend) -> Attend:
    """Wrap `attend` to process one sample at a time, for kernels that need a workspace."""

    def split(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        samples = zip(query.split(1), key.split(1), value.split(1), strict=True)
        return torch.cat([attend(*sample) for sample in samples])

    return split
