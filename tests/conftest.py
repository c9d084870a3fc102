"""What every test shares: no test reaches the network."""

import gc
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers and processes share the cores


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of our own."""
    parser.addoption("--record-losses", action="store_true", help="store the losses of the golden run anew")


def pytest_collection_finish() -> None:
    """Take what the imports have made out of the garbage collector's sight: each of our many collections walks it."""
    gc.collect()
    gc.freeze()
