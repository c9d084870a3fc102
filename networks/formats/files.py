"""Read LoRA files into one form and write them in the naming of other tools."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from networks.deltas.delta import Delta
from networks.deltas.lora import LoraDelta
from networks.formats.keys import Choose, Group, Match, match_keys
from networks.formats.kinds import KINDS, LORA, Scale, Shape
from networks.formats.peft_config import declared_scale
from wan_train.errors import InputError
from wan_train.models.weights import diffusers_name
from wan_train.storage import Header, TensorSource, read_header, read_tensors


def check_deltas(source: TensorSource, linears: Mapping[str, Shape], choose: Choose | None = None) -> None:
    """Raise InputError unless a file of changes, or the part that `choose` selects, fits a model with these `linears`,
    (out, in) by module name. Only headers are read."""
    _check(source, _open(source, linears, choose), linears)


def changed_modules(source: TensorSource, linears: Mapping[str, Shape], choose: Choose | None = None) -> set[str]:
    """Return the official names of the modules that a file, or the part of it that `choose` selects, changes. Only
    headers are read."""
    return set(_open(source, linears, choose).match.groups)


def check_lora(source: TensorSource, linears: Mapping[str, Shape], choose: Choose | None = None) -> dict[str, int]:
    """Return the rank of each pair of a LoRA, by official module name. Raises InputError as `check_deltas` does, and
    for other kinds of changes."""
    opened = _open(source, linears, choose)
    _check(source, opened, linears)
    groups = opened.match.groups
    _refuse_other_kinds([module for module, group in groups.items() if group.kind != LORA], opened.label)
    return {module: opened.header.shapes[group.keys["down"]][0] for module, group in groups.items()}


def read_deltas(source: TensorSource, module_names: Iterable[str], choose: Choose | None = None) -> dict[str, Delta]:
    """Return the changes in a file, or those that `choose` selects, by official module name; `module_names` are the
    model's.

    The scale is alpha/rank, with alpha from the file's tensors or its PEFT configuration, and 1 if there is neither.
    Raises InputError for a file without changes, of an unsupported kind, or with unmatched keys.
    """
    opened = _open(source, module_names, choose)
    opened.match.require_all(opened.label)
    declared = declared_scale(source, opened.header.metadata, opened.label)
    tensors = dict(read_tensors(source))
    deltas = {}
    for module, group in opened.match.groups.items():
        kind, parts = KINDS[group.kind], {name: tensors[key] for name, key in group.keys.items()}
        kind.measure(module, {name: tuple(part.shape) for name, part in parts.items()}, opened.label)
        deltas[module] = kind.parse(parts, _scale(group, tensors, declared, label=opened.label))
    return deltas


def read_lora(source: TensorSource, module_names: Iterable[str], choose: Choose | None = None) -> dict[str, LoraDelta]:
    """Return the pairs of a LoRA as `read_deltas` does. Raises InputError for other kinds of changes, too."""
    deltas = read_deltas(source, module_names, choose)
    pairs = {module: delta for module, delta in deltas.items() if isinstance(delta, LoraDelta)}
    _refuse_other_kinds([module for module in deltas if module not in pairs], _describe(source))
    return pairs


def kohya_state(deltas: Mapping[str, LoraDelta]) -> dict[str, Tensor]:
    """Return the pairs as `lora_unet_{module}.lora_down.weight` and `.lora_up.weight`, with `.alpha` = scale * rank."""
    state = {}
    for module, delta in deltas.items():
        name = f"lora_unet_{module.replace('.', '_')}"
        state[f"{name}.lora_down.weight"] = delta.down
        state[f"{name}.lora_up.weight"] = delta.up
        state[f"{name}.alpha"] = torch.tensor(delta.scale * delta.down.shape[0], dtype=torch.float32)
    return state


def peft_state(deltas: Mapping[str, LoraDelta], prefix: str) -> dict[str, Tensor]:
    """Return the pairs as `{prefix}.{module}.lora_A.weight` and `.lora_B.weight`, with the scale folded in."""
    state = {}
    for module, delta in deltas.items():
        name = f"{prefix}.{module}" if prefix else module
        folded = _folded(delta)
        state[f"{name}.lora_A.weight"] = folded.down
        state[f"{name}.lora_B.weight"] = folded.up
    return state


def diffusers_state(deltas: Mapping[str, LoraDelta]) -> dict[str, Tensor]:
    """Return the pairs as `peft_state` does, with diffusers' module names, below `transformer`."""
    return peft_state({diffusers_name(module): delta for module, delta in deltas.items()}, "transformer")


def require_fit(module: str, given: Shape, wanted: Shape, label: str) -> None:
    """Raise InputError, with both shapes, unless a change has the `wanted` shape."""
    if tuple(given) != tuple(wanted):
        theirs, ours = (" x ".join(map(str, shape)) for shape in (given, wanted))
        raise InputError(
            f"{label} was trained for a different model: its {module} is {theirs}, but this model's is {ours}"
        )


def _folded(delta: LoraDelta) -> LoraDelta:
    """Return the same change with scale 1. Powers of two are split between the factors: exact in any dtype."""
    fraction, exponent = math.frexp(delta.scale)
    half = exponent // 2
    down = (delta.down.float() * 2.0**half).to(delta.down.dtype)
    up = (delta.up.float() * (fraction * 2.0 ** (exponent - half))).to(delta.up.dtype)
    return LoraDelta(down, up, 1.0)


@dataclass(frozen=True)
class _Opened:
    """A file's header: its label for messages, and the changes it holds."""

    label: str
    header: Header
    match: Match


def _open(source: TensorSource, module_names: Iterable[str], choose: Choose | None) -> _Opened:
    label = _describe(source)
    header = read_header(source)
    match = match_keys(header.shapes, module_names, label)
    return _Opened(label, header, match.only(choose) if choose else match)


def _check(source: TensorSource, opened: _Opened, linears: Mapping[str, Shape]) -> None:
    label, shapes = opened.label, opened.header.shapes
    for module, group in opened.match.groups.items():
        parts = {name: shapes[key] for name, key in group.keys.items()}
        require_fit(module, KINDS[group.kind].measure(module, parts, label), linears[module], label)
    opened.match.require_all(label)
    declared_scale(source, opened.header.metadata, label)


def _refuse_other_kinds(modules: list[str], label: str) -> None:
    """Raise InputError for modules whose change is not a LoRA pair."""
    if modules:
        listed = ", ".join(modules[:10])
        raise InputError(f"{label} is not a plain LoRA: {len(modules)} modules have other kinds of changes: {listed}")


def _scale(group: Group, tensors: Mapping[str, Tensor], declared: Scale, *, label: str) -> Scale:
    """Return the scale of a group as a function of its rank: its own alpha takes precedence over the declared one."""
    key = group.alpha
    return declared if key is None else lambda rank: _number(tensors[key], key, label) / rank


def _number(alpha: Tensor, key: str, label: str) -> float:
    if alpha.numel() != 1 or not bool(alpha.isfinite().all()):
        raise InputError(f"{label}: {key} is not one finite number: the file is corrupt, download it again")
    return float(alpha)


def _describe(source: TensorSource) -> str:
    return "the LoRA" if isinstance(source, Mapping) else str(source)
