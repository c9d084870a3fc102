"""LoRA files, read into one form and written under the names that other tools know."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from networks.deltas.lora import LoraDelta
from networks.formats.keys import Choose, Shape, match_keys
from networks.formats.peft_config import declared_scale
from wan_train.errors import InputError
from wan_train.storage import TensorSource, read_header, read_tensors


def check_lora(source: TensorSource, linears: Mapping[str, Shape], choose: Choose | None = None) -> dict[str, int]:
    """The rank of each pair of a LoRA, by official module name. InputError unless it, or what `choose` leaves of it,
    fits a model with these `linears`, (out, in) by module name. Reads headers only."""
    what = _describe(source)
    header = read_header(source)
    match = match_keys(header.shapes, linears, what)
    match = match.only(choose) if choose else match
    for module, keys in match.pairs.items():
        down, up = header.shapes[keys.down], header.shapes[keys.up]
        _require_pair(module, down, up, what)
        require_fit(module, (up[0], down[1]), linears[module], what)
    match.require_all(what)
    declared_scale(source, header.metadata, what)
    return {module: header.shapes[keys.down][0] for module, keys in match.pairs.items()}


def read_lora(source: TensorSource, module_names: Iterable[str], choose: Choose | None = None) -> dict[str, LoraDelta]:
    """The pairs of a LoRA, or what `choose` leaves of them, by official module name; `module_names` are the model's.

    The scale is alpha/rank, alpha from the file's tensors or its PEFT configuration, and 1 where there is neither.
    InputError for a file that is no LoRA, is of a kind that is not supported, or has a key that no module answers to.
    """
    what = _describe(source)
    header = read_header(source)
    match = match_keys(header.shapes, module_names, what)
    match = match.only(choose) if choose else match
    match.require_all(what)
    declared = declared_scale(source, header.metadata, what)
    tensors = dict(read_tensors(source))
    deltas = {}
    for module, keys in match.pairs.items():
        down, up = tensors[keys.down], tensors[keys.up]
        _require_pair(module, tuple(down.shape), tuple(up.shape), what)
        rank = down.shape[0]
        scale = declared(rank) if keys.alpha is None else _number(tensors[keys.alpha], keys.alpha, what) / rank
        deltas[module] = LoraDelta(down, up, scale)
    return deltas


def kohya_state(deltas: Mapping[str, LoraDelta]) -> dict[str, Tensor]:
    """The pairs as `lora_unet_{module}.lora_down.weight` and `.lora_up.weight`, with `.alpha` = scale * rank."""
    state = {}
    for module, delta in deltas.items():
        name = f"lora_unet_{module.replace('.', '_')}"
        state[f"{name}.lora_down.weight"] = delta.down
        state[f"{name}.lora_up.weight"] = delta.up
        state[f"{name}.alpha"] = torch.tensor(delta.scale * delta.down.shape[0], dtype=torch.float32)
    return state


def peft_state(deltas: Mapping[str, LoraDelta], prefix: str) -> dict[str, Tensor]:
    """The pairs as `{prefix}.{module}.lora_A.weight` and `.lora_B.weight`, the scale folded into them."""
    state = {}
    for module, delta in deltas.items():
        name = f"{prefix}.{module}" if prefix else module
        folded = _folded(delta)
        state[f"{name}.lora_A.weight"] = folded.down
        state[f"{name}.lora_B.weight"] = folded.up
    return state


def require_fit(module: str, given: Shape, wanted: Shape, what: str) -> None:
    """InputError, with both sizes, unless a pair changes a matrix of the `wanted` shape."""
    if tuple(given) != tuple(wanted):
        theirs, ours = (" x ".join(map(str, shape)) for shape in (given, wanted))
        raise InputError(
            f"{what} is for another model, its {module} is {theirs}, this model's {ours}: give one of this model"
        )


def _folded(delta: LoraDelta) -> LoraDelta:
    """The same change with a scale of 1. Powers of two are shared out: they cost no precision, in whatever dtype."""
    fraction, exponent = math.frexp(delta.scale)
    half = exponent // 2
    down = (delta.down.float() * 2.0**half).to(delta.down.dtype)
    up = (delta.up.float() * (fraction * 2.0 ** (exponent - half))).to(delta.up.dtype)
    return LoraDelta(down, up, 1.0)


def _require_pair(module: str, down: Shape, up: Shape, what: str) -> None:
    if len(down) > 2 or len(up) > 2:
        raise InputError(f"{what} changes a convolution, {module}, which is not supported: give a LoRA of Linears")
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or down[0] == 0:
        shown = f"{list(down)} and {list(up)}"
        raise InputError(f"{what}: the pair of {module}, {shown}, does not multiply: the file is broken, get it again")


def _number(alpha: Tensor, key: str, what: str) -> float:
    if alpha.numel() != 1 or not bool(alpha.isfinite().all()):
        raise InputError(f"{what}: {key} is not one finite number: the file is broken, get it again")
    return float(alpha)


def _describe(source: TensorSource) -> str:
    return "the LoRA" if isinstance(source, Mapping) else str(source)
