"""Move an inactive model to CPU RAM.

Its frozen weights have pinned host copies, made once, and are only ever copied from there to the device.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wan_train.placement.lanes import Lane, Mark
from wan_train.placement.offload import as_bytes, without_gaps


class Parking:
    """The frozen parameters and the buffers of a model, on the device or in CPU RAM. Trained parameters are not moved.

    Only tensors that were modified on the device are copied back. Create it after the model has been prepared for
    training.
    """

    def __init__(self, model: nn.Module, lane: Lane) -> None:
        self._lane = lane
        self._rows = [_Row(tensor) for tensor in _untrained(model)]

    @torch.inference_mode(mode=False)
    def park(self) -> None:
        """Make the tensors views of their complete host copies, and free the device memory."""
        if any([row.leave(self._lane) for row in self._rows]):
            self._lane.finish()

    @torch.inference_mode(mode=False)  # weights fetched for a preview are used in training afterwards
    def bring(self) -> None:
        """Copy the tensors to the device for all work queued from now on. Python does not wait for the copies."""
        after, done = self._lane.mark(), None
        try:
            for row in self._rows:
                done = row.come(self._lane, after)
        finally:  # if memory does not suffice for all, what was copied can be freed again
            if done is not None:
                self._lane.wait(done)  # uploads run in order: the last one ends last


@dataclass
class _Row:
    """A tensor, its host copy if any, and the version of the tensor in that copy."""

    tensor: Tensor
    copy: Tensor | None = None
    version: int = -1

    def leave(self, lane: Lane) -> bool:
        """Free the device memory; return whether the tensor had to be copied first."""
        stale = self.copy is None or self.tensor._version != self.version
        if stale:
            near = without_gaps(self.tensor.data)
            flat = as_bytes(near)
            self.copy = lane.host(len(flat)) if self.copy is None else as_bytes(self.copy)
            lane.wait(lane.download(self.copy, flat, lane.mark()))
            self.copy = self.copy.view(near.dtype).as_strided(near.shape, near.stride())
        assert self.copy is not None
        self.tensor.data = self.copy
        return stale

    def come(self, lane: Lane, after: Mark) -> Mark:
        """Start the copy to the device; return the event of its end."""
        assert self.copy is not None, "only a parked tensor can be brought back"
        near = torch.empty_strided(self.copy.shape, self.copy.stride(), dtype=self.copy.dtype, device=lane.device)
        done = lane.upload(as_bytes(near), as_bytes(self.copy), after)
        self.tensor.data = near
        self.version = self.tensor._version
        return done


def _untrained(model: nn.Module) -> Iterable[Tensor]:
    yield from (tensor for tensor in model.parameters() if not tensor.requires_grad and tensor.numel())
    yield from (tensor for tensor in model.buffers() if tensor.numel())
