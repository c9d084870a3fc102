"""Filesystems for remote folders: fsspec's own in memory, and a local one that fails when told to."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

import wan_train.remote.uploads


class Flaky(LocalFileSystem):
    """A local filesystem that fails its next `failures` uploads, in the middle, and counts all."""

    protocol = ("flaky",)
    failures = 0
    tried: list[str]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("flaky://")))

    def put_file(self, lpath: str, rpath: str, **more: Any) -> None:
        Flaky.tried.append(Path(lpath).name)
        if Flaky.failures > 0:
            Flaky.failures -= 1
            half = Path(lpath).read_bytes()
            Path(rpath).write_bytes(half[: len(half) // 2])
            raise ConnectionError("the line is broken\nand more")
        super().put_file(lpath, rpath, **more)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[Flaky]:
    """The filesystem of `flaky://FOLDER`, with tries that follow at once."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.failures, Flaky.tried = 0, []
    monkeypatch.setattr(wan_train.remote.uploads, "WAITS", (0.0, 0.0))
    return Flaky


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """The filesystem of `memory://FOLDER`, empty."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()
