"""Weights split over processes (FSDP2, `torch.distributed.fsdp.fully_shard`): each process holds a part of the blocks'
matrices, and those of a block are gathered for its turn, while the block before it computes.

What lies outside of the blocks, and their norms, biases and scales, is whole in every process: that is little, and
some of it is used without a forward pass of the model. All processes have to call the same blocks in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

# Its name from torch 2.13 on, where the older one warns; and before.
_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class Sharding:
    """The processes that split a model's weights among them."""

    mesh: DeviceMesh

    def split(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Let the matrices of the blocks' Linears, on `meta`, be DTensors of which each process is to hold its rows.

        `blocks` are in the order of the forward pass, and the model is called as a whole. Compiling a block or
        attaching adapters comes after this: they act inside of a block's turn.
        """
        split = {id(matrix) for block in blocks for matrix in _matrices(block)}
        whole = {parameter for parameter in model.parameters() if id(parameter) not in split}
        wrapped: list[FSDPModule] = [
            fully_shard(block, mesh=self.mesh, reshard_after_forward=True, ignored_params=whole) for block in blocks
        ]
        gather: Any = _GatherBytes()
        for block in wrapped:
            block.set_custom_all_gather(gather)
        for block, following in pairwise(wrapped):
            block.set_modules_to_forward_prefetch([following])
        fully_shard(model, mesh=self.mesh, ignored_params=whole)  # has no weights of its own, but the blocks' streams


class _GatherBytes:
    """FSDP2's all-gather, for any dtype: gloo, and NCCL before 2.24, refuse 8-bit floats, so that they go as bytes."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for the result."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, *, async_op: bool = False
    ) -> dist.Work | None:
        """Gather the input of every process in the output, both flat."""
        if input_tensor.itemsize == 1:
            output_tensor, input_tensor = output_tensor.view(torch.uint8), input_tensor.view(torch.uint8)
        return _gather_flat(output_tensor, input_tensor, group=group, async_op=async_op)


def make_sharding(group: ProcessGroup | None, device: torch.device) -> Sharding | None:
    """Split weights over the processes of a group on devices of this type; None for a process alone."""
    if group is None:
        return None
    return Sharding(DeviceMesh.from_group(group, device.type))


def keep_part(slot: Tensor, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copy a whole tensor to a device and dtype, of a DTensor `slot` this process's rows only.

    Rows are split as FSDP2 does: in parts of ceil(rows / processes), of which the last may be smaller or empty.
    """
    if not isinstance(slot, DTensor):
        return tensor.to(device=device, dtype=dtype, copy=True)
    parts, rank = tensor.chunk(slot.device_mesh.size()), slot.device_mesh.get_local_rank()
    own = parts[rank] if rank < len(parts) else tensor[:0]
    local = own.to(device=device, dtype=dtype, copy=True).contiguous()
    return DTensor.from_local(
        local, slot.device_mesh, slot.placements, run_check=False, shape=slot.shape, stride=slot.stride()
    )


def _matrices(block: nn.Module) -> list[Tensor]:
    return [module.weight for module in block.modules() if isinstance(module, nn.Linear)]
