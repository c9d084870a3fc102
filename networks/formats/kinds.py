"""The kinds of changes in LoRA files: how the tensors of one module are recognised and parsed into a `Delta`.

A kind is a row of `KINDS` and a class in `networks.deltas`. A module's `.alpha` belongs to the kind of its other
tensors.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from networks.deltas.delta import Delta
from networks.deltas.lora import LoraDelta
from wan_train.errors import InputError

Shape = tuple[int, ...]
Scale = Callable[[int], float]  # by rank: alpha/rank with the declared alpha, else 1


@dataclass(frozen=True)
class DeltaKind:
    """The storage format of one kind of change.

    `split` separates a key into its module as written and the name of the part; it returns None for keys of other
    kinds. `required` are the parts that every change has. `measure(module, shapes, source)` returns the shape of the
    changed weight, (out, in) or (out, in, k, k), and raises InputError if the parts' shapes do not match each other.
    `parse` creates a change from measured parts. `source` is the file's name in messages.
    """

    split: Callable[[str], tuple[str, str] | None]
    required: frozenset[str]
    measure: Callable[[str, Mapping[str, Shape], str], Shape]
    parse: Callable[[Mapping[str, Tensor], Scale], Delta]


@dataclass(frozen=True)
class Part:
    """The meaning of a key: its module as written, the part of the module's change, and the kind of change.

    An alpha has no kind, and the part of a key that belongs to no change is "".
    """

    written: str
    name: str = ""
    kind: str | None = None


def read_key(key: str) -> Part:
    """Return which part of a change a tensor of this name is."""
    for name, kind in KINDS.items():
        if found := kind.split(key):
            return Part(*found, name)
    return Part(key.removesuffix(".alpha"), "alpha") if key.endswith(".alpha") else Part(key)


_FACTOR = re.compile(
    r"(.+)\.(?:lora_(A|B|down|up)(?:\.default)?(?:\.weight)?|lora(?:_linear_layer)?\.(down|up)\.weight)"
)
_FACTORS = {"A": "down", "B": "up", "down": "down", "up": "up"}


def _split_lora(key: str) -> tuple[str, str] | None:
    factor = _FACTOR.fullmatch(key)
    return (factor[1], _FACTORS[factor[2] or factor[3]]) if factor else None


def _measure_lora(module: str, shapes: Mapping[str, Shape], source: str) -> Shape:
    down, up = shapes["down"], shapes["up"]
    is_convolution = len(down) == len(up) == 4 and up[2:] == (1, 1)
    if not is_convolution and (len(down) > 2 or len(up) > 2):
        shown = f"{module}, by {list(down)} and {list(up)}, which is not supported"
        raise InputError(f"{source} changes a convolution, {shown}: give a LoRA of Linears and Conv2d layers")
    if min(len(down), len(up)) < 2 or down[0] != up[1] or down[0] == 0:
        shown = f"{list(down)} and {list(up)}, which cannot be multiplied"
        raise InputError(f"{source}: {module} has a pair of shapes {shown}: the file is corrupt, download it again")
    return up[0], *down[1:]


def _parse_lora(parts: Mapping[str, Tensor], scale: Scale) -> LoraDelta:
    down, up = parts["down"], parts["up"]
    return LoraDelta(down, up, scale(down.shape[0]))


LORA = "LoRA"
KINDS: dict[str, DeltaKind] = {LORA: DeltaKind(_split_lora, frozenset({"down", "up"}), _measure_lora, _parse_lora)}
