"""What was found out about files, kept in a cache folder so that no run finds it out again: `manifest.db`.

A fact holds as long as the size and the time of change of its file stay the same. The manifest only saves
time: if it is missing or broken, the same facts are found out again and written anew.
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
    """A fact as JSON, and the state of the file that it was read from."""

    size: int
    mtime_ns: int
    text: str


_Facts = dict[tuple[str, str], _Fact]


class Manifest:
    """The facts that a cache folder's manifest holds; what is learnt is written by `save`, or at the end of a `with`.

    Several threads may use one manifest, and several processes one folder.
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
        """`learn(path)`, a value that JSON can hold, or what it was when the file was last in this state.

        Raises OSError where there is no such file, and whatever `learn` raises.
        """
        status = path.stat()
        key = (topic, self._name(path))
        fact = self._facts.get(key)
        if fact is None or (fact.size, fact.mtime_ns) != (status.st_size, status.st_mtime_ns):
            fact = _Fact(status.st_size, status.st_mtime_ns, json.dumps(learn(path)))
            self._facts[key] = self._new[key] = fact
        return json.loads(fact.text)

    def note(self, topic: str, path: Path, value: Any) -> None:
        """Remember something of a file as it is now."""
        self._facts.pop((topic, self._name(path)), None)
        self.recall(topic, path, lambda _: value)

    def noted(self, topic: str, path: Path) -> Any:
        """What is remembered of a file as it is now, or None."""
        fact = self._facts.get((topic, self._name(path)))
        if fact is None:
            return None
        status = path.stat()
        return json.loads(fact.text) if (fact.size, fact.mtime_ns) == (status.st_size, status.st_mtime_ns) else None

    def save(self) -> None:
        """Write what was learnt since the last time; a folder that cannot be written to is left as it is."""
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
            logger.info("%s cannot be saved (%s): the next start will not be faster", self._folder / MANIFEST, problem)
        self._new = {}

    def _name(self, path: Path) -> str:
        # Caches by name alone, so that their folder may move.
        return _spell(path.name if path.parent == self._folder else os.path.abspath(path))


def _spell(name: str) -> str:
    """A name of any bytes that a file system allows, as text that a database takes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _read(path: Path) -> _Facts:
    """What a manifest holds; nothing, where it is missing, broken or of another version."""
    try:
        # It is replaced whole and never changed in place, so that no lock is needed to read it.
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
    """One process at a time, where the system has such locks; elsewhere the last one's facts win."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "a") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
