"""Processes that have Python, torch and our modules loaded when they start, for tests of what a process does.

A server (the standard library's fork server) loads everything once; each process is forked from it in some milliseconds
instead of the six seconds of CPU time that a fresh start takes. What a fresh start itself does (`--help` without torch,
exit codes, launchers) is tested with `subprocess` where that is the subject.
"""

import atexit
import io
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
TIMEOUT = 600


class Started:
    """A running script, one process or several ranks; the interface of `subprocess.Popen` as far as tests use it."""

    def __init__(self, script: str, words: Sequence[str], environments: Sequence[Mapping[str, str]], said: str) -> None:
        self.command = [script, *words]
        self._folder = tempfile.TemporaryDirectory(prefix="started-")
        folder = Path(self._folder.name)
        (folder / "in").write_text(said, encoding="utf-8")
        self._out = [(folder / f"out{rank}", folder / f"err{rank}") for rank in range(len(environments))]
        self.processes = [
            ForkServerProcess(
                target=_become, args=(script, list(words), dict(names), str(folder / "in"), *map(str, out))
            )
            for names, out in zip(environments, self._out, strict=True)
        ]
        _serve()
        for process in self.processes:
            process.start()
        self.pid = self.processes[0].pid

    @property
    def returncode(self) -> int | None:
        """The exit code as `Popen` has it, negative for a signal; of several the first that is not 0."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def poll(self) -> int | None:
        """The exit code, or None while any of the processes runs."""
        return self.returncode

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait until all have ended; a process that does not is killed and told."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        if self.returncode is None:
            self.kill()
            raise TimeoutExpired(self.command, timeout, *self.said())
        return self.returncode

    def communicate(self, timeout: float = TIMEOUT) -> tuple[str, str]:
        """Wait, and give what was said on stdout and stderr, rank after rank."""
        self.wait(timeout)
        return self.said()

    def said(self) -> tuple[str, str]:
        """What has been said so far."""
        texts = [[path.read_text(encoding="utf-8") if path.exists() else "" for path in pair] for pair in self._out]
        outs, errs = ([text for text in column if text] for column in zip(*texts, strict=True)) if texts else ([], [])
        return _one_after_another(outs), _one_after_another(errs)

    def send_signal(self, number: int) -> None:
        """A signal to each process and its children, as a terminal or a scheduler sends it."""
        for process in self.processes:
            if process.pid is not None and process.exitcode is None:
                _signal_group(process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.join()


def start(
    script: str, *words: object, ranks: int = 1, stdin: str = "", env: Mapping[str, str] | None = None
) -> Started:
    """Start a script from the repo root, as `ranks` processes with the variables that torchrun sets (gloo, on CPUs)."""
    names = dict(os.environ) | QUIET
    environments = [names]
    if ranks > 1:
        place = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environments = [names | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return Started(script, [str(word) for word in words], environments, stdin)


def run(script: str, *words: object, expect: int = 0, ranks: int = 1, stdin: str = "") -> CompletedProcess[str]:
    """Start a script, wait for it, check its exit code."""
    started = start(script, *words, ranks=ranks, stdin=stdin)
    out, err = started.communicate()
    shown = " ".join(started.command)
    assert started.returncode == expect, f"{shown}\nexit code {started.returncode}\n{out}{err}"
    return CompletedProcess(started.command, expect, out, err)


def _serve() -> None:
    """Make sure that the server runs; what it loads takes its number of threads from the environment."""
    server = multiprocessing.forkserver
    before = dict(os.environ)
    os.environ.update(QUIET, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])))
    try:
        server.set_forkserver_preload(["tests.loaded"])
        server.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _one_after_another(texts: Sequence[str]) -> str:
    """Join what ranks said; a killed one may leave its last line unended, which is ended here."""
    return "".join(text if text.endswith("\n") or text is texts[-1] else f"{text}\n" for text in texts)


def _become(script: str, words: list[str], names: dict[str, str], stdin: str, out: str, err: str) -> None:
    """In the new process: be what `python SCRIPT WORDS` would be."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for its workers, as in a process that nobody forked
    for number, path in enumerate((stdin, out, err)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
    os.environ.clear()
    os.environ.update(names)
    os.chdir(ROOT)
    sys.argv[:] = [script, *words]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:  # it has not made its session yet, or has just ended
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
