"""The kinds of changes that LoRA files hold: how the tensors of one module are recognised and parsed to a `Delta`.

A kind is a row of `KINDS` and a class in `networks.deltas`. The `.alpha` of a module belongs to the kind that its other
tensors are of.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from networks.deltas.delta import Delta
from networks.deltas.lora import LoraDelta
from wan_train.errors import InputError

Shape = tuple[int, ...]
Scale = Callable[[int], float]  # by rank: alpha/rank, alpha as the file declares it; 1 where it does not


@dataclass(frozen=True)
class DeltaKind:
    """How files keep the changes of one kind.

    `split` takes a key apart into its module as written and the name of the part that the tensor is, None for keys of
    other kinds; `required` are the parts that every change has. `measure(module, shapes, source)` returns the shape of
    the weight that parts of these shapes change, (out, in) or (out, in, k, k), InputError where they do not belong
    together; `parse` makes a change of parts that were measured. `source` is what messages call the file.
    """

    split: Callable[[str], tuple[str, str] | None]
    required: frozenset[str]
    measure: Callable[[str, Mapping[str, Shape], str], Shape]
    parse: Callable[[Mapping[str, Tensor], Scale], Delta]


@dataclass(frozen=True)
class Part:
    """What a key says of its tensor: its module as written, which part of the module's change it is, of which kind.

    An alpha has no kind, and the part of what belongs to no change is "".
    """

    written: str
    name: str = ""
    kind: str | None = None


def read_key(key: str) -> Part:
    """Say which part of a change a tensor of this name is."""
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
        shown = f"{list(down)} and {list(up)}, does not multiply"
        raise InputError(f"{source}: the pair of {module}, {shown}: the file is broken, get it again")
    return up[0], *down[1:]


def _parse_lora(parts: Mapping[str, Tensor], scale: Scale) -> LoraDelta:
    down, up = parts["down"], parts["up"]
    return LoraDelta(down, up, scale(down.shape[0]))


LORA = "LoRA"
KINDS: dict[str, DeltaKind] = {LORA: DeltaKind(_split_lora, frozenset({"down", "up"}), _measure_lora, _parse_lora)}
