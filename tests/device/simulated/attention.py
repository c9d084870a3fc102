"""torch's selection among its CUDA attention kernels, and their numbers, computed by the CPU's kernel.

A CPU build never selects CUDA kernels. The rules are those of an A100 or H100; cuDNN's kernel counts as FlashAttention,
which has the same limits here.

Legend: B batch, N heads, L queries, S keys, D head width.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ATEN = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
_FLASH = "aten::_scaled_dot_product_flash_attention"
_EFFICIENT = "aten::_scaled_dot_product_efficient_attention"
_WIDEST_FLASH = 256

# Bytes that kernels allocate beside their results. FlashAttention 2 sums dQ in float32, over rows rounded up to 128.
WORKSPACES: dict[str, Callable[[Any], int]] = {
    f"{_FLASH}_backward": lambda args: (
        4 * args[1].shape[0] * args[1].shape[1] * (-(-args[1].shape[2] // 128) * 128) * (args[1].shape[3] + 1)
    )
}


class Attention:
    """Stands in for torch.nn.functional.scaled_dot_product_attention.

    Not a TorchFunctionMode: those are disabled while `Tensor.backward` runs, in which blocks are recomputed.
    """

    def __init__(self, find: Callable[[str], None], used: Counter[str]) -> None:
        self.find, self.used = find, used
        self.original = functional.scaled_dot_product_attention

    def __call__(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.device.type != "cuda":
            return self.original(query, *args, **kwargs)
        return self._attend(query, *args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Run the first kernel that is enabled and supports the inputs. (B,N,L,D), (B,N,S,D) -> (B,N,L,D)."""
        if len({query.dtype, key.dtype, value.dtype}) > 1:
            raise RuntimeError(
                f"Expected query, key, and value to have the same dtype: {query.dtype} {key.dtype} {value.dtype}"
            )
        cuda, width, name = torch.backends.cuda, query.shape[-1], f"D={query.shape[-1]} {query.dtype}"
        dense = query.dim() == 4 and all(part.stride(-1) == 1 for part in (query, key, value))
        flash = cuda.flash_sdp_enabled() or cuda.cudnn_sdp_enabled()
        narrow = query.dtype in HALF and width <= _WIDEST_FLASH and width == value.shape[-1]
        if flash and dense and narrow and attn_mask is None:
            self.used[f"flash {name}"] += 1
            return _flash(query, key, value, dropout_p, is_causal, scale)
        aligned = width % (16 // query.element_size()) == 0 and query.dtype in (*HALF, torch.float32)
        efficient = cuda.mem_efficient_sdp_enabled()
        if efficient and dense and aligned:
            self.used[f"memory-efficient {name}{'' if attn_mask is None else ' with mask'}"] += 1
            return _efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)
        if not cuda.math_sdp_enabled():
            raise RuntimeError("No available kernel. Aborting execution.")
        self.used[f"math {name}"] += 1
        if flash or efficient:
            self.find(f"math attention: no other kernel takes {name}, dense: {dense} (memory grows with L x S)")
        return ATEN._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, scale: float | None) -> Tensor:
    width = query.shape[-1]
    if width % 8:
        query, key, value = (functional.pad(part, (0, 8 - width % 8)) for part in (query, key, value))
    out = ATEN._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale or width**-0.5)[
        0
    ]
    return out[..., :width]


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    trains = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    return ATEN._scaled_dot_product_efficient_attention(
        query, key, value, mask, trains, dropout_p, is_causal, scale=scale
    )[0]


def attend_on_cpu(name: str, args: Any, kwargs: Any) -> Any:
    """Return the numbers of one of CUDA's attention operators; NotImplemented for any other operator."""
    scale = kwargs.get("scale")
    if name == _FLASH:
        query, key, value = args[:3]
        out, sums = ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False, scale=scale)
        seeds = torch.zeros(2, dtype=torch.uint64), torch.empty(0, dtype=torch.uint64)
        return out, sums.float(), None, None, query.shape[2], key.shape[2], *seeds, torch.empty(0, dtype=query.dtype)
    if name == f"{_FLASH}_backward":
        grad, query, key, value, out, sums = args[:6]
        return ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, sums.float(), 0.0, False, scale=scale
        )
    if name == _EFFICIENT:
        query, key, value, mask = args[:4]
        out, sums = ATEN._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
        seed = torch.zeros((), dtype=torch.int64)
        return out, sums.float(), seed, seed
    if name == f"{_EFFICIENT}_backward":
        grad, query, key, value, mask, out, sums = args[:7]
        sums = sums[..., : query.shape[2]].contiguous()
        grads = ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, sums, 0.0, False, attn_mask=mask, scale=scale
        )
        return *grads, None
    return NotImplemented
