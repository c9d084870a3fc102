"""The process of the simulated device, started once and asked for one case after another."""

import json
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from tests.device import child
from tests.device.running import Result
from tests.device.workshop import make_all

TIMEOUT = 300  # seconds for one case


class Bench:
    """A process with the simulated device, and a folder with tiny models; results are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._results: dict[tuple[str, str | None], Result] = {}
        self._process: ForkServerProcess | None = None

    def result(self, case: str, mutant: str | None = None) -> Result:
        """Run a case, with a fault put in if `mutant` names one."""
        if (case, mutant) not in self._results:
            answer = self._ask(case, mutant)
            if "refused" in answer:
                pytest.fail(answer["refused"], pytrace=False)
            self._results[case, mutant] = Result(**answer)
        return self._results[case, mutant]

    def probe(self, name: str) -> list[str]:
        """Run one of the small programs of `probes`; return what was found."""
        answer = self._ask(name, child.PROBE)
        if "refused" in answer:
            pytest.fail(answer["refused"], pytrace=False)
        return answer["seen"]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._connection.close()
            self._process.join(10)
            self._process.kill()
            self._process = None

    def _ask(self, case: str, mutant: str | None) -> dict[str, Any]:
        if self._process is None:
            self._start()
        try:
            self._connection.send((case, mutant))
            if self._connection.poll(TIMEOUT):
                return self._connection.recv()
            reason = f"took more than {TIMEOUT} s"
        except (EOFError, OSError):
            reason = "ended its process"
        self.close()  # the next case starts another
        return {"refused": f"the case {case!r} {reason}"}

    def _start(self) -> None:
        processes._serve()
        self._connection, theirs = Pipe()
        self._process = ForkServerProcess(target=child.serve, args=(str(self.folder), theirs))
        self._process.start()
        theirs.close()


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The simulated device with tiny models of every task."""
    folder = tmp_path_factory.mktemp("device") / "all"
    make_all(folder)
    bench = Bench(folder)
    yield bench
    bench.close()


@pytest.fixture(scope="session")
def waits(root: Path) -> dict[str, int]:
    """The stored number of waits for the device in a training step, by case."""
    found: dict[str, int] = json.loads((root / "tests" / "golden" / "device_waits.json").read_text(encoding="utf-8"))
    return found
