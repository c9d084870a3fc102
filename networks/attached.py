"""LoRA files as branches of a model that generates: what was trained computes as it did in training."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from networks.deltas.lora import Branch, attach_branch
from networks.formats.files import LoraDelta, require_fit
from wan_train.errors import InputError


def attach_loras(
    model: nn.Module, loras: Sequence[tuple[Mapping[str, LoraDelta], float]], *, device: torch.device
) -> dict[str, Branch]:
    """Let LoRAs, pairs by official module name each with a multiplier, act on the model's Linears, and give the frozen
    float32 branches by module name. They are on `device`, where the model computes wherever it rests.

    A LoRA by itself with multiplier 1 does bit for bit what it did while it was trained. Several on one Linear become
    one pair of their ranks together. To be called before blocks are compiled or wrapped. InputError for what the model
    has not, or of another size.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    _require_modules(loras, linears)
    branches = {}
    for name, linear in linears.items():
        pairs = [(deltas[name], multiplier) for deltas, multiplier in loras if name in deltas]
        if pairs:
            branch = joined(pairs).requires_grad_(False).to(device)
            attach_branch(linear, branch.train(linear.training))
            branches[name] = branch
    return branches


def joined(pairs: Sequence[tuple[LoraDelta, float]]) -> Branch:
    """One branch that does what all of these pairs do together; a pair by itself stays as it is."""
    downs = [delta.down.to(torch.float32, copy=True) for delta, _ in pairs]
    ups = [delta.up.to(torch.float32, copy=True) for delta, _ in pairs]
    scales = [delta.scale * multiplier for delta, multiplier in pairs]
    if len(pairs) == 1:
        return Branch(downs[0], ups[0], scale=scales[0])
    scaled = [up * scale for up, scale in zip(ups, scales, strict=True)]
    return Branch(torch.cat(downs), torch.cat(scaled, dim=1), scale=1.0)


def _require_modules(loras: Sequence[tuple[Mapping[str, LoraDelta], float]], linears: Mapping[str, nn.Linear]) -> None:
    for deltas, _ in loras:
        missing = [name for name in deltas if name not in linears]
        if missing:
            listed = ", ".join(missing[:10])
            raise InputError(f"the model lacks {len(missing)} modules of the LoRA: {listed}; give a LoRA of this model")
        for name, delta in deltas.items():
            shape = (linears[name].out_features, linears[name].in_features)
            require_fit(name, (delta.up.shape[0], delta.down.shape[1]), shape, "the LoRA")
