"""Ring attention: keys and values circulate among processes (Liu et al. 2023, arXiv 2310.01889).

Each process keeps its queries; partial results are merged by their log-sum-exp, so the result equals attention to all
keys at once.

Legend: B batch, L queries, S keys, N heads, D head width.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from wan_train.distributed.groups import Split

aten = torch.ops.aten


def attend_with_sums(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax(q k^T / sqrt(D)) v (B, L, N, D) and the log-sum-exp (B, L, N, 1) float32 of the scores.

    query (B, L, N, D), key and value (B, S, N, D). Uses torch's kernels: flash attention on CPUs and in half precision
    on GPUs, memory-efficient attention in float32 on GPUs, plain matrix products elsewhere.
    """
    parts = [part.transpose(1, 2) for part in (query, key, value)]
    kind = query.device.type if query.device.type in _KERNELS else ""
    out, sums = _KERNELS[kind](*parts)
    return out.transpose(1, 2), sums[:, :, : query.shape[1]].float().transpose(1, 2).unsqueeze(-1)


def _on_cpu(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)


def _on_cuda(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    if query.dtype is torch.float32:
        return aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[:2]
    return aten._scaled_dot_product_flash_attention(query, key, value)[:2]


def _by_products(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    scores = (query @ key.mT).float() * query.shape[-1] ** -0.5
    sums = scores.logsumexp(-1)
    return ((scores - sums.unsqueeze(-1)).exp().to(value.dtype) @ value), sums


_KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "cpu": _on_cpu,
    "cuda": _on_cuda,
    "": _by_products,
}


def joined(out: Tensor, sums: Tensor, more: Tensor, more_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention to two sets of keys: outputs (B, L, N, D) and log-sum-exp (B, L, N, 1), float32."""
    both = torch.logaddexp(sums, more_sums)
    return out * (sums - both).exp() + more * (more_sums - both).exp(), both


def attend_in_ring(query: Tensor, key: Tensor, value: Tensor, split: Split, real: Sequence[Tensor | None]) -> Tensor:
    """Return attention (B, L, N, D) of this process's queries to the keys (B, S, N, D) of all processes of `split`.

    `real` has for each process the indices of its keys that are not padding, None for all. The transfer of the next
    keys and values overlaps with attention to the current ones.
    """
    out: Tensor | None = None
    sums = query.new_empty(0)
    here = torch.stack([key, value])
    for step in range(split.size):
        owner = (split.rank - step) % split.size
        last = step == split.size - 1
        coming, transfers = (here, []) if last else _pass_on(here, split)
        kept = real[owner]
        seen = here if kept is None else here.index_select(2, kept)
        if seen.shape[2]:
            more, more_sums = attend_with_sums(query, seen[0], seen[1])
            out, sums = (more.float(), more_sums) if out is None else joined(out, sums, more.float(), more_sums)
        for transfer in transfers:
            transfer.wait()
        here = coming
    assert out is not None, "the sequence is empty"
    return out.to(query.dtype)


def _pass_on(sent: Tensor, split: Split) -> tuple[Tensor, list[dist.Work]]:
    """Start sending keys and values to the next process and receiving those of the previous one."""
    received = torch.empty_like(sent)
    after, before = (split.rank + 1) % split.size, (split.rank - 1) % split.size
    operations = [
        dist.P2POp(dist.isend, sent, group=split.group, group_peer=after),
        dist.P2POp(dist.irecv, received, group=split.group, group_peer=before),
    ]
    return received, dist.batch_isend_irecv(operations)
