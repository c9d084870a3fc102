"""Runs that are killed or asked to stop continue as if nothing had been."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import QUIET, Started, start
from tests.tiny.make import DIT, T5, VAE
from wan_train.cli import run
from wan_train.training.settings import TOOL

Tool = Callable[..., None]
STEPS = 12
ALIKE = ("step", "epoch", "loss", "loss_average", "lr", "grad_norm")

WAYS: dict[str, tuple[object, ...]] = {
    "accumulation": (
        *(
            "--gradient_accumulation_steps",
            2,
            "--network_dropout",
            0.2,
            "--ema_decay",
            0.9,
            "--optimizer_type",
            "adamw",
        ),
        *("--network_args", "rank_dropout=0.2", "module_dropout=0.2", "--lr_scheduler", "cosine"),
    ),
    "eight_bits": ("--optimizer_type", "adamw8bit", "--num_timestep_buckets", 4, "--lr_scheduler", "rex"),
    "schedule_free": ("--optimizer_type", "AdamWScheduleFree", "--network_dropout", 0.2),
    "prodigy": ("--optimizer_type", "Prodigy", "--learning_rate", 1.0, "--lr_warmup_steps", 2),
}


class Desk:
    """A folder with caches, and runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def words(self, name: str, *more: object) -> list[str]:
        options: tuple[object, ...] = (
            *("--task", "t2v-1.3B", "--dit", self.folder / DIT, "--dataset_config", self.folder / "data.toml"),
            *("--mixed_precision", "no", "--learning_rate", 2e-2, "--sdpa", "--trust_cache"),
            *("--network_module", "networks.lora_wan", "--network_dim", 4, "--network_alpha", 4, "--seed", 1),
            *("--max_data_loader_n_workers", 0, "--max_train_steps", STEPS, "--save_every_n_steps", 2, "--save_state"),
            *("--output_dir", self.folder / "out", "--output_name", name, "--log_with", "none"),
        )
        return [str(word) for word in (*options, *more)]

    def start(self, name: str, *more: object, ranks: int = 1) -> Started:
        return start("wan_train_network.py", *self.words(name, *more), ranks=ranks)

    def finish(self, name: str, *more: object, ranks: int = 1) -> str:
        process = self.start(name, *more, ranks=ranks)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert (self.folder / "out" / f"{name}.safetensors").exists(), said
        return said

    def signal_at(self, process: Started, name: str, steps: int, number: int, pause: float = 0.0) -> str:
        """Send a signal once `steps` steps are on record; what was said."""
        metrics = self.folder / "out" / f"{name}.metrics.jsonl"
        before = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and steps <= len(metrics.read_text().splitlines()) != before:
                break
            time.sleep(0.005)
        time.sleep(pause)
        process.send_signal(number)
        return process.communicate(timeout=120)[1]

    def kept(self, name: str) -> dict[str, torch.Tensor]:
        """All that a finished run leaves of what was learnt."""
        out = self.folder / "out"
        found = {
            path.name.removeprefix(name): path
            for path in (out / f"{name}.safetensors", out / f"{name}-ema.safetensors")
        }
        state = load_file(out / f"{name}-state" / "adapter.safetensors")
        learnt = {f"{end} {k}": t for end, path in found.items() if path.exists() for k, t in load_file(path).items()}
        return learnt | flat(torch.load(out / f"{name}-state" / "run.pt", weights_only=True)) | state

    def rows(self, name: str) -> list[dict[str, float]]:
        lines = (self.folder / "out" / f"{name}.metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [{key: row[key] for key in ALIKE} for row in rows if "loss" in row]

    def assert_same(self, ours: str, whole: str) -> None:
        assert self.rows(ours) == self.rows(whole)
        assert [row["step"] for row in self.rows(ours)] == list(range(1, STEPS + 1))
        first, second = self.kept(ours), self.kept(whole)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), [
            k for k in first if not torch.equal(first[k], second[k])
        ]


def flat(state: object, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor and number in nested dicts and lists."""
    if isinstance(state, dict):
        state = list(state.items())
    elif isinstance(state, list | tuple):
        state = list(enumerate(state))
    else:
        kind = torch.is_tensor(state) or isinstance(state, int | float)
        return {name: torch.as_tensor(state)} if kind else {}
    return {key: tensor for index, part in state for key, tensor in flat(part, f"{name}/{index}").items()}


@pytest.fixture(scope="module")
def desk(tiny: Path, tmp_path_factory: pytest.TempPathFactory, run_here: Tool) -> Desk:
    folder = tmp_path_factory.mktemp("resume") / "all"
    shutil.copytree(tiny, folder)
    data = folder / "data.toml"
    text = data.read_text().replace(str(tiny), str(folder))
    data.write_text(text.replace("batch_size = 1", "batch_size = 1\nnum_repeats = 2"))  # six batches an epoch
    run_here("wan_cache_latents.py", "--dataset_config", data, "--vae", folder / VAE)
    run_here("wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--t5", folder / T5)
    return Desk(folder)


@pytest.mark.parametrize("way", WAYS)
def test_killed_runs_end_where_unbroken_ones_do(desk: Desk, way: str) -> None:
    desk.finish(f"{way}_whole", *WAYS[way])
    chance = random.Random(way)
    process = desk.start(way, *WAYS[way])
    desk.signal_at(process, way, chance.randint(3, STEPS - 2), signal.SIGKILL, pause=chance.random() * 0.05)
    assert not (desk.folder / "out" / f"{way}.safetensors").exists()
    said = desk.finish(way, *WAYS[way], "--resume", "auto")
    assert "resumed from" in said
    desk.assert_same(way, f"{way}_whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(50))
def test_fifty_random_kills(desk: Desk, number: int) -> None:
    way = list(WAYS)[number % len(WAYS)]
    whole, name = f"{way}_whole", f"{way}_{number}"
    if not (desk.folder / "out" / f"{whole}-state").exists():
        desk.finish(whole, *WAYS[way])
    chance = random.Random(number)
    process = desk.start(name, *WAYS[way])
    desk.signal_at(process, name, chance.randint(1, STEPS - 1), signal.SIGKILL, pause=chance.random() * 0.2)
    desk.finish(name, *WAYS[way], "--resume", "auto")
    desk.assert_same(name, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(desk: Desk, number: int, code: int) -> None:
    whole, name = "accumulation_whole", f"asked_{code}"
    if not (desk.folder / "out" / f"{whole}-state").exists():
        desk.finish(whole, *WAYS["accumulation"])
    workers = ("--max_data_loader_n_workers", 2, "--persistent_data_loader_workers")
    process = desk.start(name, *WAYS["accumulation"], "--save_every_n_steps", 100, *workers)
    said = desk.signal_at(process, name, 3, number)
    assert process.returncode == code, said
    assert "Traceback" not in said and said.count("asked to stop") == 1
    states = [path for path in (desk.folder / "out").glob(f"{name}-step*-state")]
    assert len(states) == 1 and f"--resume {states[0]}" in said
    desk.finish(name, *WAYS["accumulation"], "--resume", states[0])
    desk.assert_same(name, whole)


def test_two_processes_killed_and_equal_to_one(desk: Desk) -> None:
    """Two processes take the steps of one that accumulates over two batches, before and after a kill."""
    dropouts = ("--network_dropout", 0.2, "--network_args", "rank_dropout=0.2", "module_dropout=0.2")
    options = ("--optimizer_type", "adamw", *dropouts)
    desk.finish("one", *options, "--gradient_accumulation_steps", 2)
    process = desk.start("two", *options, ranks=2)
    desk.signal_at(process, "two", 5, signal.SIGKILL)
    desk.finish("two", *options, "--resume", "auto", ranks=2)
    ours, alone = desk.rows("two"), desk.rows("one")
    assert [row["step"] for row in ours] == [row["step"] for row in alone]
    for row, other in zip(ours, alone, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert (row["epoch"], row["lr"]) == (other["epoch"], other["lr"])


def test_a_killed_process_ends_the_run_of_all(desk: Desk, root: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29618"]
    command += ["wan_train_network.py", *desk.words("orphan", "--max_train_steps", 100000)]
    environment = os.environ | QUIET | {"ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = desk.folder / "out" / "orphan.metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    killed = time.monotonic()
    _, said = process.communicate(timeout=90)
    assert process.returncode != 0 and time.monotonic() - killed < 60
    assert "SIGKILL" in said
    assert not Path(f"/proc/{workers[0]}").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resume", "nowhere"), "--resume nowhere does not exist"),
        (("--resume", "{whole}", "--network_dim", 8), "--network_dim was 4, is 8"),
        (("--resume", "{whole}", "--learning_rate", 1e-3), r"--learning_rate was 0.02, is 0.001.*--resume_anyway"),
        (("--resume", "{whole}", "--seed", 2), "--seed 2 differs from the seed 1"),
        (("--resume", "{whole}"), "nothing is left to train"),
        (("--resume", "{torn}"), "run.pt is incomplete"),
    ],
)
def test_states_that_do_not_fit(
    desk: Desk, options: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = desk.folder / "out"
    whole, torn = out / "accumulation_whole-state", out / "torn-state"
    if not whole.exists():
        desk.finish("accumulation_whole", *WAYS["accumulation"])
    if not torn.exists():
        shutil.copytree(whole, torn)
        (torn / "run.pt").write_bytes((torn / "run.pt").read_bytes()[:-10])
    words = [str(word).format(whole=whole, torn=torn) for word in options]
    assert run(TOOL, [*desk.words("misfit", *WAYS["accumulation"]), *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_fresh_start_where_there_is_no_state(desk: Desk) -> None:
    said = desk.finish("fresh", "--resume", "auto", "--max_train_steps", 2)
    assert "no state of fresh" in said
