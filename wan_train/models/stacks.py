"""The stacks of transformer blocks of a DiT: in the model, and in the names of its weights."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

STACKS = ("blocks", "vace_blocks")  # in the order in which a forward pass goes through them; VACE's are the second
_NAME = re.compile(rf"(?P<stack>{'|'.join(STACKS)})\.(?P<index>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class BlockName:
    """The name of something in a block, "blocks.3.ffn.0.weight", in its parts."""

    stack: str
    index: int
    rest: str

    @property
    def block(self) -> str:
        """The name of the block, "blocks.3"."""
        return f"{self.stack}.{self.index}"


def stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The stacks that a model has, by name."""
    found = {name: getattr(model, name, None) for name in STACKS}
    return {name: stack for name, stack in found.items() if isinstance(stack, nn.ModuleList)}


def all_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of all stacks of a model, one stack after the other."""
    return [block for stack in stacks(model).values() for block in stack]


def read_block_name(name: str) -> BlockName | None:
    """The parts of an official name of something in a block; None for what is in none."""
    found = _NAME.fullmatch(name)
    return None if found is None else BlockName(found["stack"], int(found["index"]), found["rest"])


def block_names(names: Iterable[str]) -> list[str]:
    """The blocks that these weights belong to, "blocks.3", one stack after the other and each in its order."""
    parts = [part for part in map(read_block_name, names) if part is not None]
    found = {(STACKS.index(part.stack), part.index): part.block for part in parts}
    return [found[key] for key in sorted(found)]


def block_matrices(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The matrices of the blocks by module, from the shapes of all weights by official name: what low-precision modes
    store in fewer bits."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if read_block_name(name) is not None and name.endswith(".weight") and len(shape) == 2 and "norm" not in name
    }
