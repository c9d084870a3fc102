"""Attach LoRA files as branches to a model for generation, computing exactly as in training."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from networks.deltas.branch import Branch, Target, attach_branch, branch_targets, chained, weight_shape
from networks.deltas.delta import Delta
from networks.formats.files import require_fit
from wan_train.errors import InputError


def attach_loras(
    model: nn.Module, loras: Sequence[tuple[Mapping[str, Delta], float]], *, device: torch.device
) -> dict[str, Branch]:
    """Attach LoRAs, each a dict of changes by official module name with a multiplier, to the model's Linears and
    convolutions; return the frozen float32 branches by module name.

    The branches are on `device`, where the model computes, wherever its weights are stored. A single LoRA with
    multiplier 1 is bit-identical to training. Several LoRAs on one module become one branch. Call this before blocks
    are compiled or wrapped. Raises InputError for modules that the model lacks or that differ in size.
    """
    targets = branch_targets(model)
    _require_modules(loras, targets)
    branches = {}
    for name, target in targets.items():
        changes = [(deltas[name], multiplier) for deltas, multiplier in loras if name in deltas]
        if changes:
            branch = joined(changes)
            attach_branch(target, branch).requires_grad_(False).to(device).train(target.training)
            branches[name] = branch
    return branches


def joined(changes: Sequence[tuple[Delta, float]]) -> Branch:
    """Return one branch with the combined effect of several changes of a matrix; changes of one kind are merged by that
    kind."""
    by_kind: dict[type[Delta], list[tuple[Delta, float]]] = {}
    for delta, multiplier in changes:
        by_kind.setdefault(type(delta), []).append((delta, multiplier))
    return chained([kind.branch(alike) for kind, alike in by_kind.items()])


def _require_modules(loras: Sequence[tuple[Mapping[str, Delta], float]], targets: Mapping[str, Target]) -> None:
    for deltas, _ in loras:
        missing = [name for name in deltas if name not in targets]
        if missing:
            listed = ", ".join(missing[:10])
            raise InputError(
                f"the LoRA was trained for a different model: {len(missing)} of its modules are not in this one:"
                f" {listed}"
            )
        for name, delta in deltas.items():
            require_fit(name, delta.shape, weight_shape(targets[name]), "the LoRA")
