"""The stacks of transformer blocks of a DiT: in the model, and in the names of its weights."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

BASE, VACE = "blocks", "vace_blocks"
STACKS = (BASE, VACE)
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
    """The blocks of all stacks of a model, in the order in which a forward pass goes through them."""
    found = stacks(model)
    order = forward_order({name: len(stack) for name, stack in found.items()})
    return [found[stack][index] for stack, index in order]


def forward_order(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Stack and index of every block in the order of a forward pass, from the number of blocks of each stack.

    Each of VACE's comes before the base's block behind which its hint is added, `hinted_layers`.
    """
    layers = hinted_layers(counts.get(BASE, 0), counts.get(VACE, 0))
    numbers = {layer: number for number, layer in enumerate(layers)}
    order: list[tuple[str, int]] = []
    for index in range(counts.get(BASE, 0)):
        if index in numbers:
            order.append((VACE, numbers[index]))
        order.append((BASE, index))
    return order


def hinted_layers(num_layers: int, num_vace: int) -> tuple[int, ...]:
    """The base's blocks behind which the hints of `num_vace` blocks are added: evenly spaced, from the first on.

    Published models have a block of VACE for every second (30 blocks, 15 of VACE) or fifth (40, 8).
    """
    step = -(-num_layers // num_vace) if num_vace else 1
    return tuple(range(0, num_layers, step))[:num_vace]


def read_block_name(name: str) -> BlockName | None:
    """The parts of an official name of something in a block; None for what is in none."""
    found = _NAME.fullmatch(name)
    return None if found is None else BlockName(found["stack"], int(found["index"]), found["rest"])


def block_names(names: Iterable[str]) -> list[str]:
    """The blocks that these weights belong to, "blocks.3", in the order of a forward pass.

    The weights are those of a whole model, or of one stack.
    """
    found = {(part.stack, part.index) for part in map(read_block_name, names) if part is not None}
    counts = {stack: 1 + max(index for own, index in found if own == stack) for stack, _ in found}
    order = forward_order(counts) if BASE in counts else sorted(found)
    return [f"{stack}.{index}" for stack, index in order if (stack, index) in found]


def block_matrices(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The matrices of the blocks by module, from the shapes of all weights by official name: what low-precision modes
    store in fewer bits."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if read_block_name(name) is not None and name.endswith(".weight") and len(shape) == 2 and "norm" not in name
    }
