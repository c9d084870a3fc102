"""A model whose turn it is not, in CPU RAM: its frozen weights have a pinned host copy, made once, and from there they
only ever come to the device.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wan_train.placement.lanes import Lane, Mark
from wan_train.placement.offload import as_bytes, without_gaps


class Parking:
    """All of a model that is not trained, buffers too: on the device, or parked. What is trained stays where it is.

    A tensor that was written to on the device since it came is copied back; no other is. Made once the model is as it
    will be trained.
    """

    def __init__(self, model: nn.Module, lane: Lane) -> None:
        self._lane = lane
        self._rows = [_Row(tensor) for tensor in _untrained(model)]

    @torch.inference_mode(mode=False)
    def park(self) -> None:
        """Let the tensors be views of their host copies, whole, and give up the device's memory."""
        if any([row.leave(self._lane) for row in self._rows]):
            self._lane.finish()

    @torch.inference_mode(mode=False)  # what comes for a preview is there for the training after it
    def bring(self) -> None:
        """Have the tensors on the device for all that is launched from now on. Python waits for no copy."""
        after, done = self._lane.mark(), None
        try:
            for row in self._rows:
                done = row.come(self._lane, after)
        finally:  # where there is no room for all, the device's memory may be given up again
            if done is not None:
                self._lane.wait(done)  # copies are made in their order: the last one's end is the end of all


@dataclass
class _Row:
    """A tensor, its host copy once there is one, and the version of the tensor that the copy holds."""

    tensor: Tensor
    copy: Tensor | None = None
    version: int = -1

    def leave(self, lane: Lane) -> bool:
        """Give up the device's memory; whether the tensor had to be copied for that."""
        stale = self.copy is None or self.tensor._version != self.version
        if stale:
            near = without_gaps(self.tensor.data)
            flat = as_bytes(near)
            self.copy = lane.host(len(flat)) if self.copy is None else as_bytes(self.copy)
            lane.wait(lane.upload(self.copy, flat, lane.mark()))
            self.copy = self.copy.view(near.dtype).as_strided(near.shape, near.stride())
        assert self.copy is not None
        self.tensor.data = self.copy
        return stale

    def come(self, lane: Lane, after: Mark) -> Mark:
        """Start towards the device; gives the point where the tensor is there."""
        assert self.copy is not None, "only what was parked can come"
        near = torch.empty_strided(self.copy.shape, self.copy.stride(), dtype=self.copy.dtype, device=lane.device)
        done = lane.upload(as_bytes(near), as_bytes(self.copy), after)
        self.tensor.data = near
        self.version = self.tensor._version
        return done


def _untrained(model: nn.Module) -> Iterable[Tensor]:
    yield from (tensor for tensor in model.parameters() if not tensor.requires_grad and tensor.numel())
    yield from (tensor for tensor in model.buffers() if tensor.numel())
