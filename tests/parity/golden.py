"""Reads the reference cases in tests/data/golden.

A case stores what a reference implementation returned, in float32 on a CPU. Its weights and inputs are drawn by name,
so that they need no file: the seed of NumPy's frozen legacy generator is the CRC-32 of the name, plus the case's salt.
"""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parents[1] / "data"
TOLERANCE = 1e-4  # of `relative_error`


@dataclass(frozen=True)
class Case:
    """`spec` is what the case was made from, `outputs` what came out."""

    spec: dict[str, Any]
    outputs: dict[str, Tensor]

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """An input of the case."""
        return normal(name, shape, self.spec["salt"])

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of the case."""
        return state_dict(self.spec["shapes"], self.spec["salt"])


def load_case(name: str) -> Case:
    """The case `name` of tests/data/golden/cases.json."""
    specs = json.loads((DATA / "golden" / "cases.json").read_text())
    return Case(specs[name], load_file(DATA / "golden" / f"{name}.safetensors"))


def load_manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a published file: tests/data/checkpoints/NAME.json."""
    shapes = json.loads((DATA / "checkpoints" / f"{name}.json").read_text())["shapes"]
    return {key: tuple(shape) for key, shape in shapes.items()}


def normal(name: str, shape: Sequence[int], salt: int = 0) -> Tensor:
    """Standard normal float32 numbers that only the name, the shape and the salt decide."""
    generator = np.random.RandomState((zlib.crc32(name.encode()) + salt) % 2**32)
    return torch.from_numpy(np.asarray(generator.standard_normal(tuple(shape)), dtype=np.float32))


def state_dict(shapes: Mapping[str, Sequence[int]], salt: int = 0) -> dict[str, Tensor]:
    """Weights under the names of a reference checkpoint, scaled so that activations stay near one."""
    return {name: _scaled(name, normal(name, shape, salt)) for name, shape in shapes.items()}


def _scaled(name: str, x: Tensor) -> Tensor:
    leaf = name.rpartition(".")[2]
    if leaf == "bias":
        return 0.1 * x
    if leaf == "gamma" or x.ndim == 1:
        return 1.0 + 0.1 * x
    if "modulation" in leaf or "pos" in leaf or leaf == "cls_embedding":
        return 0.1 * x
    return x / math.sqrt(math.prod(x.shape[1:]))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over the norm of the reference."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} is not {tuple(theirs.shape)}"
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
