"""What every test shares: no test reaches the network."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import wan_train.remote.uploads
from tests.filesystems import Flaky, register_flaky

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


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[Flaky]:
    """The filesystem of `flaky://FOLDER`, with tries that follow at once."""
    monkeypatch.setattr(wan_train.remote.uploads, "WAITS", (0.0, 0.0))
    return register_flaky()


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """The filesystem of `memory://FOLDER`, empty."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()
