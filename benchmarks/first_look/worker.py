"""The process that measures: it describes its device, then measures each row that it is asked for."""

import gc
import time
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.first_look.ceilings import ceiling_rows
from benchmarks.first_look.encode import encode_rows
from benchmarks.first_look.modes import mode_rows
from benchmarks.first_look.parity import parity_rows
from benchmarks.first_look.records import Result
from benchmarks.first_look.resume import resume_rows
from benchmarks.first_look.rows import Measured, NotHere, Options, Row
from benchmarks.first_look.speed import speed_rows
from wan_train.errors import InputError
from wan_train.packages import first_line
from wan_train.precision import default_device

UNTIL_LATER = 1.0  # seconds: the estimate of every row at tiny sizes


def all_rows(options: Options) -> list[Row]:
    """Return the rows, in order of worth."""
    device = torch.device(options.device)
    groups: Iterable[list[Row]] = (
        ceiling_rows(device, small=options.small),
        parity_rows(device),
        mode_rows(device, small=options.small),
        resume_rows(device),
        speed_rows(device, options),
        encode_rows(device, small=options.small),
    )
    rows = [row for group in groups for row in group]
    return [row for row in rows if not options.only or row.name.startswith(options.only)]


def describe(options: Options) -> dict[str, Any]:
    """Return the device, its memory in GiB, and the versions, for the record."""
    device = torch.device(options.device)
    about: dict[str, Any] = {"device": str(device), "torch": torch.__version__, "small": options.small}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["device"] = properties.name
        about["memory_gib"] = round(properties.total_memory / 2**30, 1)
        about["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        about["cuda"], about["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return about


def serve(options: Options, pipe: Connection) -> None:
    """Send the machine and the rows with their estimates, or why nothing can be measured; then a result for each name
    received, until None."""
    rows = {row.name: row for row in all_rows(options)} if _is_there(options.device) else None
    if not rows:
        there = f"no row begins with {' or '.join(options.only)}: see docs/benchmarks.md"
        missing = f"--device {options.device} is not available: try the script itself with --device cpu --small"
        pipe.send({"refused": missing if rows is None else there})
        return
    estimates = {name: UNTIL_LATER if options.small else row.seconds for name, row in rows.items()}
    pipe.send({"machine": describe(options), "rows": estimates})
    while (asked := pipe.recv()) is not None:
        name, earlier = asked
        pipe.send(attempt(rows[name], earlier, torch.device(options.device)))


def _is_there(name: str) -> bool:
    try:
        return default_device(name).type != "meta"
    except InputError:
        return False


def attempt(row: Row, earlier: Mapping[str, Result], device: torch.device) -> Result:
    """Measure a row; return its result. An error is its result too, with `lost` if the device is unusable since."""
    began, result = time.perf_counter(), Result(row=row.name)
    try:
        result |= _judged(row.measure(earlier))
    except NotHere as missing:
        result |= {"status": "skipped", "reason": str(missing)}
    except Exception as problem:  # kernels, compilers and packages raise all kinds of errors
        result |= {"status": "failed", "reason": f"{type(problem).__name__}: {first_line(problem)}"}
        if not _responds(device):
            result["lost"] = True
    gc.collect()
    if device.type == "cuda" and "lost" not in result:
        torch.cuda.empty_cache()
    return result | {"took_s": round(time.perf_counter() - began, 2)}


def _judged(measured: Measured) -> Result:
    wrong = {"reason": measured.wrong} if measured.wrong else {}
    return {"status": "wrong" if measured.wrong else "ok"} | wrong | measured.values


def _responds(device: torch.device) -> bool:
    """Return whether the device still computes; after some errors every later call fails."""
    try:
        return float(torch.ones(1, device=device).sum()) == 1.0
    except RuntimeError:
        return False
