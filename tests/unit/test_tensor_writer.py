"""Checkpoints written tensor by tensor."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from wan_train.tensor_writer import Row, write_tensors

TENSORS = {
    "a.weight": torch.randn(3, 5).bfloat16(),
    "a.bias": torch.randn(3),
    "scalar": torch.tensor(2.0),
    "codes": torch.randn(7).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 4),
}
ROWS = {name: Row(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def test_a_file_written_in_any_order_is_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, ROWS, reversed(TENSORS.items()), {"format": "pt"})
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype is tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].float(), tensor.float())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_are_cast_to_what_is_announced(tmp_path: Path) -> None:
    path, values = tmp_path / "m.safetensors", torch.tensor([1.0, 3.14159])
    write_tensors(path, {"x": Row((2,), torch.bfloat16)}, [("x", values)], {})
    assert torch.equal(load_file(path)["x"], values.bfloat16())


@pytest.mark.parametrize(
    "tensors",
    [
        [("other", torch.zeros(2))],
        [("x", torch.zeros(3))],
        [("x", torch.zeros(2)), ("x", torch.zeros(2))],
        [],
    ],
)
def test_what_is_not_announced_or_missing_leaves_no_file(tensors: list[tuple[str, Tensor]], tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_tensors(tmp_path / "m.safetensors", {"x": Row((2,), torch.float32)}, tensors, {})
    assert os.listdir(tmp_path) == []


def test_tensors_are_taken_one_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for index in range(3):
            alive.append(os.path.getsize(next(tmp_path.rglob("new.safetensors"))))
            yield f"t{index}", torch.zeros(200_000)

    write_tensors(tmp_path / "m.safetensors", {f"t{i}": Row((200_000,), torch.float32) for i in range(3)}, stream(), {})
    assert alive[0] < alive[1] < alive[2]  # what came before is on its way to the disk when the next is asked for
