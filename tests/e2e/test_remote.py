"""Runs and videos that go to remote folders."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file

from tests.filesystems import Flaky
from tests.tiny.make import DIT, T5, VAE
from wan_train.training import loop

Tool = Callable[..., None]


@pytest.fixture(scope="module")
def cached(tiny: Path, tmp_path_factory: pytest.TempPathFactory, run_here: Tool) -> Path:
    """The tiny models and clips, with caches."""
    folder = tmp_path_factory.mktemp("remote") / "all"
    shutil.copytree(tiny, folder)
    data = folder / "data.toml"
    data.write_text(data.read_text().replace(str(tiny), str(folder)))
    run_here("wan_cache_latents.py", "--dataset_config", data, "--vae", folder / VAE)
    run_here("wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--t5", folder / T5)
    return folder


@pytest.fixture
def train(cached: Path, run_here: Tool) -> Callable[..., None]:
    """`train(output_dir, *options)`: train six steps, keeping of every second step the last."""

    def run(output_dir: object, *more: object, expect: int = 0) -> None:
        run_here(
            "wan_train_network.py",
            *("--task", "t2v-1.3B", "--dit", cached / DIT, "--dataset_config", cached / "data.toml", "--trust_cache"),
            *("--sdpa", "--mixed_precision", "no", "--learning_rate", 2e-2, "--network_module", "networks.lora_wan"),
            *("--network_dim", 4, "--seed", 1, "--max_data_loader_n_workers", 0, "--max_train_steps", 6),
            *("--save_every_n_steps", 2, "--save_last_n_steps", 2, "--save_state", "--log_with", "none"),
            *("--output_dir", output_dir, "--output_name", "x", *more),
            expect=expect,
        )

    return run


def generate(cached: Path, run_here: Tool, save_path: object, *more: object, expect: int = 0) -> None:
    run_here(
        "wan_generate_video.py",
        *("--task", "t2v-1.3B", "--dit", cached / DIT, "--vae", cached / VAE, "--t5", cached / T5, "--prompt", "a cat"),
        *("--video_size", 32, 32, "--video_length", 5, "--infer_steps", 2, "--seed", 3, "--device", "cpu"),
        *("--save_path", save_path, *more),
        expect=expect,
    )


def names(folder: Path) -> set[str]:
    """The files and states in a folder."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def objects(memory: MemoryFileSystem) -> set[str]:
    """The files and states in memory://runs."""
    return {str(path).split("/")[2] for path in memory.store}


def other_machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Be on a machine with nothing in its cache folder; where a run's local folders are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "wan-train" / "remote"


def test_a_run_goes_to_the_remote_folder_and_goes_on_elsewhere(
    train: Callable[..., None],
    cached: Path,
    memory: MemoryFileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    train(tmp_path / "whole")
    one = other_machine(monkeypatch, tmp_path / "one")
    prompts = ("--sample_prompts", cached / "prompts.txt", "--sample_every_n_steps", 4)
    train("memory://runs", *prompts, "--vae", cached / VAE, "--t5", cached / T5, "--max_train_steps", 4)
    (local,) = (path for path in one.iterdir())
    assert objects(memory) == names(local), "retention holds there too"
    assert {"x-step00000002.safetensors", "x-step00000002-state"} & objects(memory) == set()
    assert {"x.safetensors", "x-state", "x.run.json", "x.config.toml", "x.metrics.jsonl", "sample"} <= objects(memory)
    assert 'output_dir = "memory://runs"' in memory.cat_file("/runs/x.config.toml").decode()
    for path in (path for path in local.rglob("*") if path.is_file() and not path.name.startswith(".")):
        assert memory.cat_file(f"/runs/{path.relative_to(local)}") == path.read_bytes(), path

    two = other_machine(monkeypatch, tmp_path / "two")
    caplog.clear()
    train("memory://runs", "--resume", "auto")
    assert any("downloading the state x-state from memory://runs" in each for each in caplog.messages)
    (local,) = two.iterdir()
    assert len((local / "x.metrics.jsonl").read_text().splitlines()) == 6
    assert memory.cat_file("/runs/x.metrics.jsonl") == (local / "x.metrics.jsonl").read_bytes()
    ours, whole = load_file(local / "x.safetensors"), load_file(tmp_path / "whole" / "x.safetensors")
    assert all(torch.equal(ours[name], whole[name]) for name in whole) and ours.keys() == whole.keys()


def test_a_state_is_resumed_from_by_its_url(
    train: Callable[..., None],
    memory: MemoryFileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other_machine(monkeypatch, tmp_path / "cache")
    train("memory://runs", "--local_output_dir", tmp_path / "mine", "--max_train_steps", 2)
    assert {"x.safetensors", "x-state"} <= names(tmp_path / "mine")
    train(tmp_path / "out", "--resume", "memory://runs/x-state", "--max_train_steps", 4)
    assert len((tmp_path / "out" / "x.metrics.jsonl").read_text().splitlines()) == 2
    capsys.readouterr()
    memory.rm_file("/runs/x-state/run.pt")
    shutil.rmtree(tmp_path / "cache")
    train(tmp_path / "out", "--resume", "memory://runs/x-state", expect=2)
    assert "--resume memory://runs/x-state is incomplete: give the URL" in capsys.readouterr().err


def test_a_run_that_is_asked_to_stop_waits_for_its_uploads(
    train: Callable[..., None], flaky: type[Flaky], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, report = Flaky.put_file, loop.report

    def slow(self: Flaky, lpath: str, rpath: str, **more: Any) -> None:
        time.sleep(0.05)
        put(self, lpath, rpath, **more)

    def stopping(*given: Any) -> None:
        report(*given)
        if given[2].step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Flaky, "put_file", slow)
    monkeypatch.setattr(loop, "report", stopping)
    train(f"flaky://{tmp_path}/there", "--local_output_dir", tmp_path / "here", expect=143)
    assert {"x-step00000003.safetensors", "x-step00000003-state"} <= names(tmp_path / "here")
    assert names(tmp_path / "there") == names(tmp_path / "here")


def test_training_goes_on_where_uploads_fail(
    train: Callable[..., None], flaky: type[Flaky], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Flaky.failures = 10**6
    train(f"flaky://{tmp_path}/there", "--local_output_dir", tmp_path / "here", "--max_train_steps", 2)
    assert {"x.safetensors", "x-state"} <= names(tmp_path / "here")
    assert names(tmp_path / "there") == set()
    told = [each for each in caplog.messages if each.startswith(f"{tmp_path / 'here' / 'x.safetensors'} could not be")]
    assert len(told) == 1


def test_videos_go_to_the_remote_folder_and_leave_the_disk(
    cached: Path, run_here: Tool, memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = other_machine(monkeypatch, tmp_path / "cache")
    generate(cached, run_here, tmp_path / "plain.mp4")
    generate(cached, run_here, "memory://runs/{seed}/x.mp4", "--output_type", "both")
    assert set(memory.store) == {"/runs/3/x.mp4", "/runs/3/x_latent.safetensors"}
    assert [path for path in local.rglob("*") if path.is_file()] == []
    assert memory.cat_file("/runs/3/x.mp4") != (tmp_path / "plain.mp4").read_bytes(), "of another --output_type"
    generate(cached, run_here, "memory://runs/same.mp4", "--local_output_dir", tmp_path / "mine")
    assert memory.cat_file("/runs/same.mp4") == (tmp_path / "plain.mp4").read_bytes()
    assert names(tmp_path / "mine") == {"same.mp4"}
    generate(cached, run_here, "memory://runs/all", "--output_pattern", "wan_output_{seed}_{index}.mp4")
    assert "/runs/all/wan_output_3_000.mp4" in memory.store


def test_a_video_that_cannot_be_uploaded_stays_and_is_named(
    cached: Path,
    run_here: Tool,
    flaky: type[Flaky],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    local = other_machine(monkeypatch, tmp_path / "cache")
    Flaky.failures = 3
    generate(cached, run_here, f"flaky://{tmp_path}/there/x.mp4", expect=1)
    (kept,) = local.rglob("x.mp4")
    assert f"1 result(s) could not be uploaded to flaky://{tmp_path}/there: {kept}" in capsys.readouterr().err


def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    train: Callable[..., None], cached: Path, run_here: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for call, told in (
        (lambda: train("nope://x", expect=2), "--output_dir nope://x cannot be opened (fsspec does not know nope://)"),
        (lambda: train(tmp_path, "--local_output_dir", "y", expect=2), f"--output_dir {tmp_path} is local: omit it"),
        (lambda: generate(cached, run_here, "nope://x", expect=2), "--save_path nope://x cannot be opened"),
    ):
        call()
        said = capsys.readouterr().err
        assert told in said and "loading" not in said
