"""A filesystem for remote folders that fails when told to."""

from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


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


def register_flaky() -> type[Flaky]:
    """Have fsspec open `flaky://FOLDER`; nothing has failed or been tried yet."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.failures, Flaky.tried = 0, []
    return Flaky
