"""Profiles of some steps."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wan_train.profiling.profiler import ACTIVE, WAIT, WARMUP, Profiler

STEPS = WAIT + WARMUP + ACTIVE


def take_steps(profiler: Profiler, count: int) -> list[Tensor]:
    """Steps whose number is told by the operator that they run."""
    generator, found = torch.Generator().manual_seed(0), []
    operators = (torch.sin, torch.cos, torch.exp, torch.tanh, torch.sigmoid, torch.erf, torch.atan)
    for step in range(count):
        found.append(operators[step](torch.randn(8, 8, generator=generator) @ torch.ones(8, 8)))
        profiler.step()
    return found


def operators(path: Path) -> set[str]:
    with gzip.open(path, "rt") as file:
        return {event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "cpu_op"}


def test_the_active_steps_are_traced_and_no_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Profiler(str(tmp_path), "x") as profiler:
        traced = take_steps(profiler, STEPS + 2)
    found = operators(tmp_path / "x.trace.json.gz")
    assert {"aten::exp", "aten::tanh", "aten::sigmoid", "aten::mm"} <= found
    assert not {"aten::sin", "aten::cos", "aten::erf", "aten::atan"} & found
    table = (tmp_path / "x.operators.txt").read_text()
    assert "aten::tanh" in table and "Self CPU" in table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.operators.txt", "x.trace.json.gz"]
    (told,) = caplog.messages
    assert told.startswith(f"profile: {tmp_path / 'x.trace.json.gz'} and ") and "most time in aten::" in told
    plain = take_steps(Profiler(None, "x"), STEPS + 2)
    assert all(torch.equal(*pair) for pair in zip(traced, plain, strict=True))


def test_only_the_first_use_is_profiled(tmp_path: Path) -> None:
    profiler = Profiler(str(tmp_path), "x")
    with profiler:
        take_steps(profiler, STEPS)
    first = (tmp_path / "x.trace.json.gz").stat().st_mtime_ns
    with profiler:
        take_steps(profiler, STEPS)
    assert (tmp_path / "x.trace.json.gz").stat().st_mtime_ns == first


def test_a_short_run_is_traced_as_far_as_it_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Profiler(str(tmp_path / "four"), "x") as profiler:
        take_steps(profiler, 4)
    assert "aten::tanh" in operators(tmp_path / "four" / "x.trace.json.gz")
    caplog.clear()
    with Profiler(str(tmp_path / "two"), "x") as profiler:
        take_steps(profiler, 2)
    assert caplog.messages == ["--profile: no trace written: it needs 3 steps, and there were 2"]
    assert not (tmp_path / "two").exists()


def test_a_folder_that_is_gone_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with Profiler(str(tmp_path / "file"), "x") as profiler:
        assert len(take_steps(profiler, STEPS)) == STEPS
    (told,) = caplog.messages
    assert told.startswith(f"--profile: cannot write {tmp_path / 'file'}")


def test_nothing_is_done_without_a_folder(caplog: pytest.LogCaptureFixture) -> None:
    with Profiler(None, "x") as profiler:
        take_steps(profiler, STEPS)
    assert caplog.messages == []
