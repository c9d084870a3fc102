"""One video on several processes equals the same video on one; see `shared_passes.py` for what each process does."""

import itertools
import json
from pathlib import Path

import pytest

from tests import processes
from tests.unit.sampling.shared_passes import HEADS, KINDS, TOKENS

Sizes = tuple[int, int, int]  # of ulysses, ring and guidance


def compare(folder: Path, ranks: int, *sizes: Sizes) -> None:
    result = folder / "result"
    processes.run("tests/unit/sampling/shared_passes.py", result, *itertools.chain(*sizes), ranks=ranks)
    for rank in range(ranks):
        for (ulysses, ring, _), found in zip(sizes, json.loads(Path(f"{result}.{rank}").read_text()), strict=True):
            assert found.keys() == {*KINDS, "sampling"}
            assert max(difference for difference, _ in found.values()) < 1e-5, (rank, ulysses, ring, found)
            if ulysses * ring == 1:
                continue
            whole = HEADS * TOKENS**2
            for kind, (_, largest) in found.items():
                if kind not in ("sampling", "reference"):
                    # Padding is at most one token for each process and group of tokens.
                    padded = (TOKENS + 3 * ulysses * ring) ** 2
                    assert 0 < largest <= HEADS * padded / ulysses / ring**2 < whole


def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    compare(tmp_path, 2, (2, 1, 1), (1, 2, 1), (1, 1, 2))


@pytest.mark.slow
def test_four_processes_make_what_one_makes(tmp_path: Path) -> None:
    compare(tmp_path, 4, (4, 1, 1), (1, 4, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2))


@pytest.mark.slow
def test_eight_processes_split_everything(tmp_path: Path) -> None:
    compare(tmp_path, 8, (2, 2, 2))
