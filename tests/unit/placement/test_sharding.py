"""Models whose weights are split over processes; see `sharded_models.py` for what each process does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import processes
from tests.tiny.make import T5, TOKENIZER, draw_weight, make_tokenizer, save, t5_shapes
from tests.unit.placement.sharded_models import LORA, STORED
from tests.unit.sampling.shared_passes import HEADS, KINDS, make_dit


def write_models(folder: Path) -> None:
    for kind, parts in KINDS.items():
        weights = {name: tensor.contiguous() for name, tensor in make_dit(**parts).state_dict().items()}
        save_file(weights, folder / f"{kind}.safetensors", {"num_heads": str(HEADS)})
    dim = 24 * HEADS
    pair = {"down": draw_weight("down", (4, dim)), "up": draw_weight("up", (dim, 4))}
    save_file({f"lora_unet_blocks_1_self_attn_q.lora_{key}.weight": part for key, part in pair.items()}, folder / LORA)
    save(folder / T5, t5_shapes(make_tokenizer(folder / TOKENIZER)), torch.float32)


def compare(folder: Path, ranks: int, *sizes: int, parts: int) -> None:
    """Models on `ranks` processes are what one makes, and each process keeps one of so many parts of their blocks."""
    write_models(folder)
    processes.run("tests/unit/placement/sharded_models.py", folder / "result", folder, *sizes, ranks=ranks)
    for rank in range(ranks):
        found = json.loads((folder / f"result.{rank}").read_text())
        assert {*KINDS, *STORED, "merged", "merged fp8", "attached", "compiled", "sampling"} <= found.keys()
        for name, (difference, *_) in found.items():
            assert difference < 1e-5, (rank, name, difference)
        for name, of in {**dict.fromkeys(KINDS, parts), "t5": ranks, "t5 fp8": ranks}.items():
            _, most, largest, held, whole, inside = found[name]
            assert held <= whole - inside + 1.03 * inside / of, (rank, name, "rows that do not divide: a few more")
            if name != "t5 fp8":  # there a matrix and its codes
                assert most <= held + largest < whole, (rank, name, "one whole tensor at a time, beside what is kept")


def test_two_processes_split_models(tmp_path: Path) -> None:
    compare(tmp_path, 2, 2, 1, 1, parts=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "sizes", "parts"), [(3, (1, 3, 1), 3), (4, (4, 1, 1), 4), (4, (2, 1, 2), 2), (4, (2, 2, 1), 4)]
)
def test_more_processes_split_models(ranks: int, sizes: tuple[int, int, int], parts: int, tmp_path: Path) -> None:
    compare(tmp_path, ranks, *sizes, parts=parts)
