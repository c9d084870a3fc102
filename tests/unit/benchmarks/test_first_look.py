"""The parts of benchmarks/first_look: the file of results, the budget, what counts as wrong, the tables."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.first_look import modes, speed, supervision
from benchmarks.first_look.models import TINY, Geometry, Mode
from benchmarks.first_look.modes import MODES, RECOMPUTED, check, trace
from benchmarks.first_look.records import Records, Refused, Result, missing_rows
from benchmarks.first_look.rows import Measured, NotHere, Options, Row, beyond
from benchmarks.first_look.speed import Passes, fitting_blocks, products_of, share
from benchmarks.first_look.supervision import supervise
from benchmarks.first_look.tables import tables
from benchmarks.first_look.worker import attempt, serve
from wan_train.errors import InputError
from wan_train.quantization.settings import WeightSettings

CPU = torch.device("cpu")
OPTIONS = Options("cpu", small=True)
MACHINE = {"device": "cpu", "torch": "2", "small": True}


class Simulated:
    """A worker whose rows are a table: a status, or an exit code for a row that ends the process, None for a hang."""

    rows: Mapping[str, float] = {}
    does: Mapping[str, str | int | None] = {}
    machine = MACHINE
    started = 0
    asked: list[str] = []  # noqa: RUF012

    def __init__(self, options: Options) -> None:
        type(self).started += 1
        self.exit_code: int | None = None

    def measure(self, name: str, earlier: Mapping[str, Result], limit: float) -> Result | None:
        self.asked.append(name)
        does = self.does.get(name, "ok")
        if isinstance(does, str):
            return {"row": name, "status": does.removesuffix(" lost")} | ({"lost": True} if "lost" in does else {})
        self.exit_code = does
        return None

    def stop(self) -> None:
        pass


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> type[Simulated]:
    class Fresh(Simulated):
        asked: list[str] = []  # noqa: RUF012

    monkeypatch.setattr(supervision, "Worker", Fresh)
    return Fresh


def statuses(records: Records) -> dict[str, str]:
    return {name: result["status"] for name, result in records.latest().items() if name != "machine"}


def test_a_cut_line_is_passed_over_and_the_last_result_counts(tmp_path: Path) -> None:
    records = Records(tmp_path / "deep" / "look.jsonl")
    assert records.latest() == {}
    records.add({"row": "a", "status": "failed"})
    with records.path.open("a") as file:
        file.write('{"row": "b", "sta')
    records.add({"row": "a", "status": "ok"})
    assert records.latest() == {"a": {"row": "a", "status": "ok"}}


def test_what_is_missing_comes_before_what_failed() -> None:
    status = {"a": "ok", "b": "failed", "c": "skipped", "d": "wrong"}
    latest = {name: {"row": name, "status": value} for name, value in status.items()}
    assert missing_rows(["a", "b", "c", "d", "e"], latest) == ["c", "e", "b", "d"]


def test_results_of_two_machines_do_not_share_a_file(tmp_path: Path) -> None:
    records = Records(tmp_path / "look.jsonl")
    records.check_machine(MACHINE)
    records.check_machine(MACHINE)
    assert len(records.path.read_text().splitlines()) == 1
    with pytest.raises(Refused, match=r"torch was 2, is 3\): give another --out"):
        records.check_machine(MACHINE | {"torch": "3"})


def test_a_row_that_does_not_fit_is_skipped_and_measured_by_the_next_run(
    simulated: type[Simulated], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulated.rows = {"short": 1.0, "long": 100.0, "last": 1.0}
    records = Records(tmp_path / "look.jsonl")
    supervise(OPTIONS, records, seconds=50)
    assert statuses(records) == {"short": "ok", "long": "skipped", "last": "ok"}
    assert "skipped long: about 100 s, and 50 s are left" in capsys.readouterr().out
    supervise(OPTIONS, records, seconds=200)
    assert simulated.asked == ["short", "last", "long"]
    assert set(statuses(records).values()) == {"ok"}


def test_a_row_that_ends_the_process_does_not_end_the_others(simulated: type[Simulated], tmp_path: Path) -> None:
    simulated.rows = dict.fromkeys(("a", "killed", "b", "lost", "hang", "c"), 1.0)
    simulated.does = {"killed": -9, "lost": "failed lost", "hang": None}
    records = Records(tmp_path / "look.jsonl")
    supervise(OPTIONS, records, seconds=1000)
    found = records.latest()
    assert found["killed"]["reason"] == "the process ended with exit code -9"
    assert found["hang"]["reason"] == "no result after 120 s"
    assert "lost" not in found["lost"]
    assert [found[name]["status"] for name in ("a", "b", "c")] == ["ok"] * 3
    assert simulated.started == 4


def test_a_row_cut_by_the_budget_is_missing_and_not_failed(simulated: type[Simulated], tmp_path: Path) -> None:
    simulated.rows, simulated.does = {"hang": 1.0}, {"hang": None}
    records = Records(tmp_path / "look.jsonl")
    supervise(OPTIONS, records, seconds=30)
    assert records.latest()["hang"]["reason"] == "the time was up during this row"
    assert statuses(records) == {"hang": "skipped"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (Options("xpu:7"), "--device xpu:7 is not available: try the script itself with --device cpu --small"),
        (Options("cpu", only=("spead/",)), "no row begins with spead/: see docs/benchmarks.md"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(options: Options, told: str) -> None:
    sent: list[object] = []
    serve(options, SimpleNamespace(send=sent.append))  # type: ignore[arg-type]
    assert sent == [{"refused": told}]


def raising(problem: Exception) -> Callable[[object], Measured]:
    def measure(earlier: object) -> Measured:
        raise problem

    return measure


def test_errors_become_results_of_one_line() -> None:
    failed = attempt(Row("a", 1.0, raising(RuntimeError("bad kernel\nand a long trace"))), {}, CPU)
    assert (failed["status"], failed["reason"]) == ("failed", "RuntimeError: bad kernel")
    assert "lost" not in failed
    skipped = attempt(Row("a", 1.0, raising(NotHere("no GPU"))), {}, CPU)
    assert (skipped["status"], skipped["reason"]) == ("skipped", "no GPU")
    wrong = attempt(Row("a", 1.0, lambda earlier: Measured({"x": 1.0}, "too big")), {}, CPU)
    assert (wrong["status"], wrong["reason"], wrong["x"]) == ("wrong", "too big", 1.0)


def test_an_error_is_beyond_its_limit_if_it_is_no_smaller() -> None:
    limits = {"a": 0.1, "b": 0.1}
    assert beyond({"a": 0.1, "b": 0.0}, limits) == ""
    assert beyond({"a": 0.2, "b": math.nan}, limits) == "a 0.2 is above 0.1; b nan is above 0.1"


@pytest.mark.parametrize("part", ["losses", "gradients", "exact"])
def test_a_mode_that_computes_something_else_is_wrong(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def faulty(mode: Mode, device: torch.device) -> modes.Trace:
        found, factor = trace(mode, device), 1.0 if calls else 1.03
        calls.append(mode)
        if part == "losses":
            return modes.Trace(found.losses * factor, found.gradients)
        if part == "gradients":
            return modes.Trace(found.losses, {name: each * factor for name, each in found.gradients.items()})
        return modes.Trace(found.losses * (1 + 1e-6), found.gradients) if len(calls) == 1 else found

    assert check("gradient_checkpointing", MODES["gradient_checkpointing"], CPU, {}).wrong == ""
    monkeypatch.setattr(modes, "trace", faulty)
    wrong = check("gradient_checkpointing", MODES["gradient_checkpointing"], CPU, {}).wrong
    assert wrong.startswith({"exact": "the first loss is not that of a plain LoRA"}.get(part, f"{part} 0.03 is above"))


def test_modes_that_the_machine_lacks_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise InputError("no fp8 products")

    with pytest.raises(NotHere, match="needs a GPU and the package bitsandbytes"):
        check("bitsandbytes AdamW8bit", MODES["bitsandbytes AdamW8bit"], CPU, {})
    monkeypatch.setattr(modes, "check_fp8_product", refuse)
    with pytest.raises(NotHere, match="no fp8 products"):
        check("fp8 products", MODES["fp8 products"], CPU, {})


def test_a_step_at_the_ceilings_has_a_share_of_one() -> None:
    geometry = Geometry(dim=100, ffn=200, heads=1, layers=1, text_dim=8, latents=(16, 1, 40, 100))
    tokens, text = geometry.tokens, 512
    assert (tokens, products_of(geometry)) == (1000, 8 * 100**2 + 2 * 100 * 200)
    products = 2 * (tokens * (6 * 100**2 + 2 * 100 * 200) + text * 2 * 100**2)
    scores = 4 * tokens * (tokens + text) * 100
    earlier = {
        "ceiling/products bf16": {"tflops": 2e-3},
        "ceiling/attention bf16": {"tflops": 1e-3, "backward_tflops": 5e-4},
    }
    ideal = 3 * products / 2e9 + 2 * scores / 1e9 + 2.5 * scores / 5e8
    assert share(ideal, geometry, Passes(), earlier)["share_of_ceiling"] == pytest.approx(1.0)
    assert share(2 * ideal, geometry, Passes(), earlier)["share_of_ceiling"] == pytest.approx(0.5)
    assert share(1.0, geometry, Passes(), {"ceiling/products bf16": {"reason": "failed"}}) == {}


def test_blocks_are_as_many_as_fit() -> None:
    plain = Mode(activations=RECOMPUTED)
    narrow = Mode(weights=WeightSettings(int8_base=True), activations=RECOMPUTED)
    assert fitting_blocks(plain, Geometry(), None) == 40
    assert fitting_blocks(plain, Geometry(), 139 * 2**30) == 40
    few = fitting_blocks(plain, Geometry(), 24 * 2**30)
    assert 2 < few < fitting_blocks(narrow, Geometry(), 24 * 2**30) < 40
    assert fitting_blocks(plain, Geometry(), 2**30) == 2


def test_fewer_blocks_are_tried_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def step(*given: object) -> dict[str, float]:
        tried.append(given[-2])
        if given[-2] > 2:  # type: ignore[operator]
            raise torch.OutOfMemoryError("no memory")
        return {"seconds": 1.0}

    monkeypatch.setattr(speed, "step", step)
    rows = {row.name: row for row in speed.speed_rows(CPU, OPTIONS)}
    measured = rows["speed/resident"].measure({})
    assert tried == [4, 3, 2]
    assert measured.values == {"blocks": 2, "tokens": TINY.tokens, "seconds": 1.0}
    rows = {row.name: row for row in speed.speed_rows(CPU, Options("cpu", small=True, blocks=3))}
    with pytest.raises(NotHere, match="for 3 blocks"):
        rows["speed/resident"].measure({})


def test_results_become_tables_by_group() -> None:
    latest = {
        "machine": {"row": "machine", "status": "ok", "device": "X1", "torch": "2"},
        "speed/a": {"row": "speed/a", "status": "ok", "seconds": 12.34567, "blocks": 40, "took_s": 3.0},
        "speed/b": {"row": "speed/b", "status": "failed", "reason": "a | b", "took_s": 3.0},
    }
    assert tables(latest) == (
        "Measured on X1 (torch 2) by `python benchmarks/gpu_first_look.py`.\n\n"
        "### A 14B LoRA step at 832x480x81\n\n"
        "| row | seconds | blocks | result |\n|---|---|---|---|\n"
        "| a | 12.35 | 40 | ok |\n| b |  |  | failed: a / b |\n"
    )
