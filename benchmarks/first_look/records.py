"""The file of results: one JSON object a line, appended as they come. The last line of a row counts."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]  # `row`, its name; `status`: ok, wrong, failed or skipped; `reason`; what was measured
MACHINE = "machine"
SAME = ("device", "torch", "small")  # what all results of a file have in common


class Refused(ValueError):
    """Nothing can be measured as asked; the text says why and what to change."""


class Records:
    """A file of results that a later run continues."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def latest(self) -> dict[str, Result]:
        """Return the last result of each row, in the order in which rows first came; a broken line is passed over."""
        found: dict[str, Result] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        for line in lines:
            try:
                result = json.loads(line)
                found[result["row"]] = result
            except (ValueError, TypeError, KeyError):  # the line that was being written when a run was killed
                continue
        return found

    def add(self, result: Mapping[str, Any]) -> None:
        """Append a result and flush it to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(result).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def check_machine(self, machine: Mapping[str, Any]) -> None:
        """Record the machine, or raise Refused if the file holds another one's results."""
        before = self.latest().get(MACHINE)
        if before is None:
            self.add({"row": MACHINE, "status": "ok", **machine})
            return
        changed = [
            f"{name} was {before.get(name)}, is {machine[name]}" for name in SAME if before.get(name) != machine[name]
        ]
        if changed:
            raise Refused(f"{self.path} holds other results ({'; '.join(changed)}): give another --out")


def missing_rows(names: Sequence[str], latest: Mapping[str, Result]) -> list[str]:
    """Return the rows to measure: those never tried or skipped, then those that failed or came out wrong."""
    new = [name for name in names if latest.get(name, {"status": "skipped"})["status"] == "skipped"]
    again = [name for name in names if name in latest and latest[name]["status"] in ("failed", "wrong")]
    return new + again
