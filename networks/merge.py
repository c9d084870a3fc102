"""Merge LoRA files into the tensors of a checkpoint while they are streamed."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from networks.deltas.delta import Delta
from networks.formats.files import require_fit
from wan_train.errors import InputError


def merged(
    tensors: Iterable[tuple[str, Tensor]],
    loras: Sequence[tuple[Mapping[str, Delta], float]],
    *,
    unrounded: Container[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors with multiplier * change added to `M.weight` for each LoRA that changes the module M.

    The sum is computed in float32 on the tensor's device and rounded once, to the tensor's dtype; for modules in
    `unrounded`, which are quantised later, it stays float32. Other tensors are passed through unchanged. Raises
    Raises InputError if a change does not fit its matrix, or matches no tensor.
    """
    waiting = {module for deltas, _ in loras for module in deltas}
    for name, tensor in tensors:
        module = name.removesuffix(".weight")
        changes = [(deltas[module], multiplier) for deltas, multiplier in loras if module in deltas]
        if changes and name != module:
            waiting.discard(module)
            for delta, _ in changes:
                require_fit(module, delta.shape, tuple(tensor.shape), "the LoRA")
            total = add_deltas(tensor, changes)
            yield name, total if module in unrounded else total.to(tensor.dtype)
        else:
            yield name, tensor
    if waiting:
        listed = ", ".join(sorted(waiting)[:10])
        raise InputError(
            f"the LoRA was trained for a different model: {len(waiting)} of its modules are not in this one: {listed}"
        )


def add_deltas(weight: Tensor, changes: Iterable[tuple[Delta, float]]) -> Tensor:
    """Return weight (out, in) + the sum of multiplier * change, in float32."""
    total = weight.to(torch.float32, copy=True)
    for delta, multiplier in changes:
        delta.add_to(total, multiplier)
    return total
