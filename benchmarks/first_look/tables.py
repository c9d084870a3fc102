"""The results as Markdown tables for docs/benchmarks.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.first_look.records import MACHINE, Result

TITLES = {
    "ceiling": "Ceilings of the device",
    "parity": "Golden cases on the device",
    "mode": "Two training steps of each mode, device against CPU",
    "resume": "A resumed run",
    "speed": "A 14B LoRA step at 832x480x81",
    "vae": "Encoding a clip of 832x480x81",
}
HIDDEN = ("row", "status", "reason", "took_s")


def tables(latest: Mapping[str, Result]) -> str:
    """Return one table for each group of rows, and a line on the machine."""
    parts = [_machine(latest[MACHINE])] if MACHINE in latest else []
    for group, title in TITLES.items():
        rows = [result for name, result in latest.items() if name.partition("/")[0] == group]
        if rows:
            parts.append(f"### {title}\n\n{_table(rows)}")
    return "\n\n".join(parts) + "\n"


def _machine(machine: Result) -> str:
    told = [f"{name} {value}" for name, value in machine.items() if name not in (*HIDDEN, "device")]
    return f"Measured on {machine['device']} ({', '.join(told)}) by `python benchmarks/gpu_first_look.py`."


def _table(rows: Sequence[Result]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in HIDDEN))
    lines = [["row", *(column.replace("_", " ") for column in columns), "result"]]
    for row in rows:
        told = row["status"] + (f": {_cell(row['reason'])}" if row.get("reason") else "")
        lines.append([row["row"].partition("/")[2], *(_cell(row.get(column)) for column in columns), told])
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def _cell(value: Any) -> str:
    """Return a value with four digits, text that cannot break the table, or nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
