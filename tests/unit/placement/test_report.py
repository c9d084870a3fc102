"""The peak of a process on systems that count it differently, as they are or simulated."""

import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from wan_train.placement import report
from wan_train.placement.report import describe_peak, peak_host_bytes
from wan_train.training.reporting.metrics import peak_memory_mib

CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, platform: str, peak: int | None) -> None:
    """Be a system without /proc, whose `ru_maxrss` is `peak`; None for one without the module."""
    monkeypatch.setattr(report, "_STATUS", Path("/nowhere/status"))
    monkeypatch.setattr(sys, "platform", platform)
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: SimpleNamespace(ru_maxrss=peak))
    monkeypatch.setitem(sys.modules, "resource", usage if peak is not None else None)


def test_the_peak_here_is_above_what_is_taken_now() -> None:
    assert psutil.Process().memory_info().rss * 0.9 < peak_host_bytes() < psutil.virtual_memory().total


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("freebsd14", 1024)])
def test_systems_count_in_units_of_their_own(platform: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, platform, 3 * 2**30 // unit)
    assert peak_memory_mib(CPU) == 3 * 1024
    assert describe_peak(CPU) == "3.00 GiB of CPU RAM"


def test_windows_has_no_module_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "win32", None)
    assert peak_memory_mib(CPU) > 0
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=2**30, peak_wset=2**31))
    monkeypatch.setattr(report.psutil, "Process", lambda: process)
    assert peak_memory_mib(CPU) == 2048
