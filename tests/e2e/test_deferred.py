"""A run whose losses are read after the next step has been launched is the run that reads them at once.

On a GPU these are the runs of torch's fused AdamW. A CPU has it too, and is taken for a GPU here where it is decided
when losses are read.
"""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.e2e.test_resume import ALIKE, flat
from tests.tiny.make import DIT, T5, VAE
from wan_train.training import loop, outcome

Tool = Callable[..., None]
STEPS, EVERY = 7, 3


class Desk:
    """Runs in a folder with caches."""

    def __init__(self, folder: Path, run_here: Tool) -> None:
        self.folder, self.run_here = folder, run_here

    def train(self, name: str, *more: object, data: str = "data.toml", expect: int = 0) -> None:
        self.run_here(
            "wan_train_network.py",
            *("--task", "t2v-1.3B", "--dit", self.folder / DIT, "--dataset_config", self.folder / data, "--seed", 1),
            *("--mixed_precision", "no", "--optimizer_type", "AdamW", "--optimizer_args", "fused=true"),
            *(
                "--network_module",
                "networks.lora_wan",
                "--network_dim",
                4,
                "--network_alpha",
                4,
                "--learning_rate",
                2e-2,
            ),
            *("--max_data_loader_n_workers", 0, "--max_train_steps", STEPS, "--save_every_n_steps", EVERY),
            *("--save_state", "--output_dir", self.folder / "out", "--output_name", name, "--log_with", "none", *more),
            expect=expect,
        )

    def rows(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / "out" / f"{name}.metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [{key: row.get(key) for key in (*ALIKE, "strata", "adapter_norm")} for row in rows]

    def kept(self, name: str, moment: str = "") -> dict[str, torch.Tensor]:
        state = self.folder / "out" / f"{name}{moment}-state"
        saved = load_file(self.folder / "out" / f"{name}{moment}.safetensors")
        return saved | flat(torch.load(state / "run.pt", weights_only=True)) | load_file(state / "adapter.safetensors")

    def assert_same(self, ours: str, whole: str) -> None:
        assert self.rows(ours) == self.rows(whole)
        assert [row["step"] for row in self.rows(ours)] == list(range(1, STEPS + 1))
        for moment in ("", f"-step{EVERY:08d}"):
            first, second = self.kept(ours, moment), self.kept(whole, moment)
            assert first.keys() == second.keys()
            assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.fixture(scope="module")
def desk(tiny: Path, tmp_path_factory: pytest.TempPathFactory, run_here: Tool) -> Desk:
    folder = tmp_path_factory.mktemp("deferred") / "all"
    shutil.copytree(tiny, folder)
    data = folder / "data.toml"
    data.write_text(data.read_text().replace(str(tiny), str(folder)))
    run_here("wan_cache_latents.py", "--dataset_config", data, "--vae", folder / VAE)
    run_here("wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--t5", folder / T5)
    made = Desk(folder, run_here)
    made.train("whole")
    return made


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Defers the reading of losses, and tells in which order steps are launched and reported."""
    told: list[str] = []
    take, report = loop.take_step, loop.report

    def launch(window: Any, position: Any, **named: Any) -> Any:
        told.append(f"launch {position.step}")
        return take(window, position, **named)

    def tell(writer: Any, bar: Any, metrics: Any) -> None:
        told.append(f"report {metrics.step}")
        report(writer, bar, metrics)

    monkeypatch.setattr(outcome, "can_pin", lambda device: True)
    monkeypatch.setattr(loop, "take_step", launch)
    monkeypatch.setattr(loop, "report", tell)
    return told


def spoiled(desk: Desk) -> str:
    """A dataset of which one clip's latents are NaN."""
    folder = desk.folder / "spoiled"
    if not folder.exists():
        shutil.copytree(desk.folder / "cache", folder)
        path = next(folder.glob("red_circle_0*_wan.safetensors"))
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = {
            key: torch.full_like(t, torch.nan) if key.startswith("latents") else t for key, t in load_file(path).items()
        }
        save_file(tensors, path, metadata)
        text = (desk.folder / "data.toml").read_text()
        (desk.folder / "spoiled.toml").write_text(text.replace(str(desk.folder / "cache"), str(folder)))
    return "spoiled.toml"


def test_a_step_is_reported_once_the_next_is_launched_and_before_its_state_is_saved(
    desk: Desk, events: list[str]
) -> None:
    desk.train("late")
    desk.assert_same("late", "whole")
    ahead = "launch 1, launch 2, report 1, launch 3, report 2, report 3, launch 4"  # saved after step 3
    assert ", ".join(events).startswith(ahead)
    assert sorted(events) == sorted(f"{verb} {step}" for verb in ("launch", "report") for step in range(1, STEPS + 1))


def test_steps_that_are_nan_are_skipped_on_the_device(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    desk.train("nan-whole", "--skip_nonfinite", 9, data=spoiled(desk))
    at_once = [line for line in capsys.readouterr().err.splitlines() if "step skipped" in line]
    request.getfixturevalue("events")
    desk.train("nan-late", "--skip_nonfinite", 9, data=spoiled(desk))
    assert [line for line in capsys.readouterr().err.splitlines() if "step skipped" in line] == at_once != []
    desk.assert_same("nan-late", "nan-whole")
    assert any(row["loss"] is None for row in desk.rows("nan-late"))


def test_a_run_of_nan_stops_and_says_which_step_was_not_taken(
    desk: Desk, events: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    desk.train("nan-stopped", data=spoiled(desk), expect=1)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    step = int(said.partition(" at step ")[2].partition(",")[0])
    assert "the loss is nan" in said and "red_circle" in said and "stopped before the step was taken" in said
    assert [row["step"] for row in desk.rows("nan-stopped")] == list(range(1, step))
    assert not list((desk.folder / "out").glob(f"nan-stopped-step{step:08d}*"))


def test_a_stopped_run_has_reported_what_it_saved_and_resumes_to_the_bit(
    desk: Desk, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    take = loop.take_step

    def stopping(window: Any, position: Any, **named: Any) -> Any:
        if position.step == 5:
            signal.raise_signal(signal.SIGTERM)
        return take(window, position, **named)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stopping)
        desk.train("stopped", expect=143)
    assert [row["step"] for row in desk.rows("stopped")] == [1, 2, 3, 4, 5]
    assert events[-1] == "report 5"
    desk.train("stopped", "--resume", "auto")
    desk.assert_same("stopped", "whole")


def test_the_step_before_one_that_fails_is_on_record(
    desk: Desk, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    take = loop.take_step

    def failing(window: Any, position: Any, **named: Any) -> Any:
        if position.step == 5:
            raise KeyboardInterrupt
        return take(window, position, **named)

    monkeypatch.setattr(loop, "take_step", failing)
    desk.train("failed", expect=130)
    assert [row["step"] for row in desk.rows("failed")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "options",
    [("--optimizer_args", "fused=none"), ("--ema_decay", 0.9), ("--scale_weight_norms", 1.0)],
    ids=["not fused", "EMA", "limited norms"],
)
def test_other_runs_read_each_loss_before_the_optimizers_step(
    desk: Desk, events: list[str], options: tuple[object, ...]
) -> None:
    desk.train("other", *options, "--max_train_steps", 2)
    assert events == ["launch 1", "report 1", "launch 2", "report 2"]
