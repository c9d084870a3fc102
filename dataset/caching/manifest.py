"""Facts about files, kept in `manifest.db` in a cache folder so that later runs need not determine them again.

A fact is valid as long as the size and modification time of its file are unchanged. The manifest only saves time: if it
is missing or corrupt, the facts are determined again and rewritten.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.storage import replacing

logger = get_logger(__name__)

MANIFEST = "manifest.db"
_VERSION = 1
_LOCK = ".manifest.lock"
_TABLE = (
    "CREATE TABLE facts (kind TEXT, name TEXT, size INTEGER, mtime_ns INTEGER, fact TEXT, PRIMARY KEY (kind, name))"
)


class _Fact(NamedTuple):
    """A fact as JSON, and the size and modification time of the file it was read from."""

    size: int
    mtime_ns: int
    text: str


_Facts = dict[tuple[str, str], _Fact]


class Manifest:
    """The facts in a cache folder's manifest; new ones are written by `save`, or at the end of a `with` block.

    Safe for several threads per manifest and several processes per folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._facts = _read(folder / MANIFEST)
        self._new: _Facts = {}

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(self, *problem: object) -> None:
        self.save()

    def recall(self, topic: str, path: Path, learn: Callable[[Path], Any]) -> Any:
        """Return `learn(path)`, a JSON value, or its stored result if the file has not changed.

        Raises OSError if the file does not exist, and whatever `learn` raises.
        """
        status = path.stat()
        key = (topic, self._name(path))
        fact = self._facts.get(key)
        if fact is None or (fact.size, fact.mtime_ns) != (status.st_size, status.st_mtime_ns):
            fact = _Fact(status.st_size, status.st_mtime_ns, json.dumps(learn(path)))
            self._facts[key] = self._new[key] = fact
        return json.loads(fact.text)

    def note(self, topic: str, path: Path, value: Any) -> None:
        """Store a value for the current state of a file."""
        self._facts.pop((topic, self._name(path)), None)
        self.recall(topic, path, lambda _: value)

    def noted(self, topic: str, path: Path) -> Any:
        """Return the value stored for the current state of a file, or None."""
        fact = self._facts.get((topic, self._name(path)))
        if fact is None:
            return None
        status = path.stat()
        return json.loads(fact.text) if (fact.size, fact.mtime_ns) == (status.st_size, status.st_mtime_ns) else None

    def save(self) -> None:
        """Write new facts to disk; a read-only folder is left unchanged."""
        if not self._new:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(self._folder / _LOCK):
                facts = _read(self._folder / MANIFEST) | self._new
                there = {_spell(name) for name in os.listdir(self._folder)}
                kept = {key: fact for key, fact in facts.items() if os.sep in key[1] or key[1] in there}
                _write(self._folder / MANIFEST, kept)
        except (InputError, OSError, sqlite3.Error) as problem:
            logger.info(
                "could not write %s (%s): the next start will take as long as this one",
                self._folder / MANIFEST,
                problem,
            )
        self._new = {}

    def _name(self, path: Path) -> str:
        # Caches by file name only, so that their folder can be moved.
        return _spell(path.name if path.parent == self._folder else os.path.abspath(path))


def _spell(name: str) -> str:
    """Return a file name of arbitrary bytes as text for the database."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _read(path: Path) -> _Facts:
    """Return the contents of a manifest; empty if it is missing, corrupt or of another version."""
    try:
        # The file is replaced atomically and never modified in place, so reading needs no lock.
        address = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        with contextlib.closing(sqlite3.connect(address, uri=True)) as database:
            if database.execute("PRAGMA user_version").fetchone() != (_VERSION,):
                return {}
            rows = database.execute("SELECT kind, name, size, mtime_ns, fact FROM facts")
            return {(topic, name): _Fact(*fact) for topic, name, *fact in rows}
    except sqlite3.Error:
        return {}


def _write(path: Path, facts: _Facts) -> None:
    with replacing(path) as temporary, contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.execute(f"PRAGMA user_version = {_VERSION}")
        database.execute("BEGIN")
        database.execute(_TABLE)
        database.executemany("INSERT INTO facts VALUES (?, ?, ?, ?, ?)", ((*key, *fact) for key, fact in facts.items()))
        database.execute("COMMIT")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes where the system supports it; elsewhere the last writer wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "a") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
