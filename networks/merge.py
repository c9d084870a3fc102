"""Merging LoRA files into a checkpoint while it streams by."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from networks.formats.files import LoraDelta, require_fit
from wan_train.errors import InputError


def merged(
    tensors: Iterable[tuple[str, Tensor]],
    loras: Sequence[tuple[Mapping[str, LoraDelta], float]],
    *,
    unrounded: Container[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """A pipe that adds multiplier * scale * up @ down to `M.weight` for each LoRA that has a pair for the module M.

    The sum is taken in float32 on the tensor's device and rounded once, to the tensor's dtype; for the modules in
    `unrounded`, which something else will quantise, it stays float32. What no LoRA changes passes as it is.
    InputError when a pair does not fit its matrix, or is left over at the end.
    """
    waiting = {module for deltas, _ in loras for module in deltas}
    for name, tensor in tensors:
        module = name.removesuffix(".weight")
        pairs = [(deltas[module], multiplier) for deltas, multiplier in loras if module in deltas]
        if pairs and name != module:
            waiting.discard(module)
            for delta, _ in pairs:
                require_fit(module, (delta.up.shape[0], delta.down.shape[1]), tuple(tensor.shape), "the LoRA")
            total = add_deltas(tensor, pairs)
            yield name, total if module in unrounded else total.to(tensor.dtype)
        else:
            yield name, tensor
    if waiting:
        listed = ", ".join(sorted(waiting)[:10])
        raise InputError(f"the model lacks {len(waiting)} modules of the LoRA: {listed}; give a LoRA of this model")


def add_deltas(weight: Tensor, pairs: Iterable[tuple[LoraDelta, float]]) -> Tensor:
    """weight (out, in) + the sum of multiplier * scale * up @ down, in float32."""
    total = weight.to(torch.float32, copy=True)
    for delta, multiplier in pairs:
        down, up = (factor.to(total.device, torch.float32) for factor in (delta.down, delta.up))
        total.addmm_(up, down, alpha=multiplier * delta.scale)
    return total
