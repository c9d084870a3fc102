"""The stacks of transformer blocks of a DiT, in the model and in weight names."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

BASE, VACE = "blocks", "vace_blocks"
STACKS = (BASE, VACE)
_NAME = re.compile(rf"(?P<stack>{'|'.join(STACKS)})\.(?P<index>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class BlockName:
    """The parts of a name inside a block, such as "blocks.3.ffn.0.weight"."""

    stack: str
    index: int
    rest: str

    @property
    def block(self) -> str:
        """Return the name of the block, "blocks.3"."""
        return f"{self.stack}.{self.index}"


def stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the stacks of a model by name."""
    found = {name: getattr(model, name, None) for name in STACKS}
    return {name: stack for name, stack in found.items() if isinstance(stack, nn.ModuleList)}


def all_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of all stacks in the order of the forward pass."""
    found = stacks(model)
    order = forward_order({name: len(stack) for name, stack in found.items()})
    return [found[stack][index] for stack, index in order]


def forward_order(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return (stack, index) of every block in the order of the forward pass, given the number of blocks per stack.

    A VACE block comes right before the base block after which its hint is added; see `hinted_layers`.
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
    """Return the base blocks after which the hints of `num_vace` blocks are added: evenly spaced, starting at 0.

    Published models have a VACE block for every second base block (30 blocks, 15 of VACE) or every fifth (40, 8).
    """
    step = -(-num_layers // num_vace) if num_vace else 1
    return tuple(range(0, num_layers, step))[:num_vace]


def read_block_name(name: str) -> BlockName | None:
    """Split an official name inside a block into its parts; None for names outside of blocks."""
    found = _NAME.fullmatch(name)
    return None if found is None else BlockName(found["stack"], int(found["index"]), found["rest"])


def block_names(names: Iterable[str]) -> list[str]:
    """Return the blocks ("blocks.3") that these weights belong to, in the order of the forward pass.

    The weights are those of a complete model, or of one stack.
    """
    found = {(part.stack, part.index) for part in map(read_block_name, names) if part is not None}
    counts = {stack: 1 + max(index for own, index in found if own == stack) for stack, _ in found}
    order = forward_order(counts) if BASE in counts else sorted(found)
    return [f"{stack}.{index}" for stack, index in order if (stack, index) in found]


def block_matrices(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the matrix shapes of the blocks by module, from the shapes of all weights by official name.

    These are the matrices that low-precision modes quantise.
    """
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if read_block_name(name) is not None and name.endswith(".weight") and len(shape) == 2 and "norm" not in name
    }
