"""The process of the simulated device: it runs cases as they are asked for, one after another."""

import os
import signal
import tempfile
import traceback
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.device.simulated.hooks import CannotSimulate, install

PROBE = "probe"  # asked for in place of a mutant: the name is that of a small program


def serve(folder: str, connection: Connection) -> None:
    """Answer names of cases, and of mutants beside them, with results until the other end is closed.

    The hooks are installed before the first backward pass of the process, and stay; Python's own exit is skipped, since
    finalizers run in an order that the hooks do not survive.
    """
    try:
        install()
    except CannotSimulate as problem:
        connection.send({"refused": str(problem)})
        os._exit(1)
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            case, mutant = connection.recv()
        except EOFError:
            os._exit(0)
        connection.send(_answered(Path(folder), case, mutant))


def _answered(folder: Path, name: str, mutant: str | None) -> dict[str, Any]:
    from tests.device.mutants import MUTANTS
    from tests.device.probes import PROBES, see
    from tests.device.running import run_case
    from tests.device.table import CASES

    try:
        if mutant == PROBE:
            return {"seen": see(PROBES[name])}
        with tempfile.TemporaryDirectory(dir=folder) as own:
            patches = [MUTANTS[mutant].patch()] if mutant else []
            return asdict(run_case(CASES[name], folder, Path(own), patches=patches, compare=not mutant))
    except Exception:
        return {"refused": traceback.format_exc()}
