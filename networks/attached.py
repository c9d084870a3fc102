"""LoRA files as branches of a model that generates: what was trained computes as it did in training."""

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
    """Let LoRAs, changes by official module name and a multiplier each, act on the model's Linears and convolutions,
    and return the frozen float32 branches by module name. They are on `device`, where the model computes wherever it
    rests.

    A LoRA by itself with multiplier 1 does bit for bit what it did while it was trained. Several on one module become
    one branch. To be called before blocks are compiled or wrapped. InputError for what the model has not, or of another
    size.
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
    """One branch that does what all of these changes of a matrix do together; those of a kind join as the kind says."""
    by_kind: dict[type[Delta], list[tuple[Delta, float]]] = {}
    for delta, multiplier in changes:
        by_kind.setdefault(type(delta), []).append((delta, multiplier))
    return chained([kind.branch(alike) for kind, alike in by_kind.items()])


def _require_modules(loras: Sequence[tuple[Mapping[str, Delta], float]], targets: Mapping[str, Target]) -> None:
    for deltas, _ in loras:
        missing = [name for name in deltas if name not in targets]
        if missing:
            listed = ", ".join(missing[:10])
            raise InputError(f"the model lacks {len(missing)} modules of the LoRA: {listed}; give a LoRA of this model")
        for name, delta in deltas.items():
            require_fit(name, delta.shape, weight_shape(targets[name]), "the LoRA")
