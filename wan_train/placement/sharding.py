"""Shard weights over processes with FSDP2 (`torch.distributed.fsdp.fully_shard`).

Each process holds a shard of the blocks' matrices; those of a block are gathered when it runs, while the previous block
computes. Parameters outside of blocks, and norms, biases and scales, are replicated: they are small, and some are used
without a forward pass of the model. All processes must call the same blocks in the same order.
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

# Renamed in torch 2.13, where the old name warns.
_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class Sharding:
    """The processes over which a model's weights are sharded."""

    mesh: DeviceMesh

    def split(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Make the weights of the blocks' Linears, on the meta device, DTensors sharded by rows.

        `blocks` are in forward order, and the model must be called as a whole. Compile blocks and attach adapters
        afterwards: they act inside a block's forward pass.
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
        fully_shard(model, mesh=self.mesh, ignored_params=whole)  # has no weights, but the blocks' streams


class _GatherBytes:
    """FSDP2's all-gather for any dtype: gloo, and NCCL before 2.24, do not support 8-bit floats, which are sent as
    bytes."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate the output."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, *, async_op: bool = False
    ) -> dist.Work | None:
        """Gather the inputs of all processes into the output, both flat."""
        if input_tensor.itemsize == 1:
            output_tensor, input_tensor = output_tensor.view(torch.uint8), input_tensor.view(torch.uint8)
        return _gather_flat(output_tensor, input_tensor, group=group, async_op=async_op)


def make_sharding(group: ProcessGroup | None, device: torch.device) -> Sharding | None:
    """Return the sharding over the processes of a group on devices of this type; None without a group."""
    if group is None:
        return None
    return Sharding(DeviceMesh.from_group(group, device.type))


def keep_part(slot: Tensor, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copy a whole tensor to a device and dtype; if `slot` is a DTensor, only this process's rows.

    Rows are split like in FSDP2: in chunks of ceil(rows / processes), of which the last may be smaller or empty.
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
