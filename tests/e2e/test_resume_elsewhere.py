"""What is resumed beside a run's own last state: states of older versions, ends, and data that was made anew."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.tiny.make import DIT, T5, VAE
from wan_train.cli import run
from wan_train.training.saving.save import save
from wan_train.training.settings import TOOL

Tool = Callable[..., None]
Caught = pytest.CaptureFixture[str]
LEARNING_RATE = 1e-2
STATES = Path(__file__).parents[1] / "data" / "states"
# With these options, for 3 steps, an epoch, the stored state was saved, before states said of which run they are.
OPTIONS: tuple[object, ...] = (
    *("--task", "t2v-1.3B", "--mixed_precision", "no", "--network_module", "networks.lora_wan", "--network_dim", 1),
    *("--network_args", r'exclude_patterns=[r".*"]', r'include_patterns=[r"blocks\.0\.self_attn\.q"]'),
    *("--learning_rate", LEARNING_RATE, "--max_data_loader_n_workers", 0, "--log_with", "none", "--sdpa"),
)


class Desk:
    """A folder with caches of three clips, which are an epoch, and runs in it."""

    def __init__(self, folder: Path, run_here: Tool) -> None:
        self.folder, self.out, self.run_here = folder, folder / "out", run_here

    def cache(self) -> None:
        data = ("--dataset_config", self.folder / "data.toml")
        self.run_here("wan_cache_latents.py", *data, "--vae", self.folder / VAE)
        self.run_here("wan_cache_text_encoder_outputs.py", *data, "--t5", self.folder / T5)

    def train(self, name: str, *more: object, expect: int = 0) -> None:
        files = ("--dit", self.folder / DIT, "--dataset_config", self.folder / "data.toml")
        place = ("--output_dir", self.out, "--output_name", name)
        self.run_here("wan_train_network.py", *OPTIONS, "--seed", 1, *files, *place, *more, expect=expect)

    def learnt(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.out / f"{name}.safetensors")

    def steps(self, name: str) -> tuple[str, str]:
        """After which step a file was saved, and by which run."""
        with safe_open(self.out / f"{name}.safetensors", "pt") as file:
            return file.metadata()["ss_steps"], file.metadata()["ss_session_id"]

    def names(self, pattern: str) -> set[str]:
        return {path.name for path in self.out.glob(pattern)}

    def have_same(self, ours: str, whole: str) -> bool:
        first, second = self.learnt(ours), self.learnt(whole)
        return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)

    def have_close(self, ours: str, whole: str) -> bool:
        """As `have_same`, but for a state from another machine, whose kernels round differently."""
        first, second = self.learnt(ours), self.learnt(whole)
        close = {key: torch.allclose(first[key], second[key], rtol=0, atol=0.1 * LEARNING_RATE) for key in first}
        return first.keys() == second.keys() and all(close.values())


@pytest.fixture
def desk(cached: Path, tmp_path: Path, run_here: Tool) -> Desk:
    folder = tmp_path / "all"
    shutil.copytree(cached, folder)
    data = folder / "data.toml"
    data.write_text(data.read_text().replace(str(cached), str(folder)))
    return Desk(folder, run_here)


@pytest.fixture(scope="module")
def cached(tiny: Path, tmp_path_factory: pytest.TempPathFactory, run_here: Tool) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere") / "all"
    shutil.copytree(tiny, folder)
    data = folder / "data.toml"
    data.write_text(data.read_text().replace(str(tiny), str(folder)))
    Desk(folder, run_here).cache()
    return folder


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`kill(moment)`: the next run dies once all of this moment is saved."""

    def install(moment: str) -> None:
        def dying(saving: Any, at: str, **named: Any) -> None:
            save(saving, at, **named)
            if at == moment:
                monkeypatch.undo()
                raise KeyboardInterrupt

        monkeypatch.setattr("wan_train.training.loop.save", dying)

    return install


@pytest.mark.parametrize("gone", [None, "--full_bf16", "flip_augment of dataset 1", "--lr_scheduler_timescale"])
def test_a_state_of_before_is_resumed(desk: Desk, gone: str | None) -> None:
    state = desk.out / "name-state"
    shutil.copytree(STATES / "name-state", state)
    if gone is not None:  # as before this option was there
        manifest = json.loads((state / "manifest.json").read_text())
        del manifest["configuration"][gone]
        (state / "manifest.json").write_text(json.dumps(manifest))
    desk.train("whole", "--max_train_steps", 6)
    desk.train("name", "--max_train_steps", 6, "--resume", "auto", "--save_state")
    assert desk.steps("name")[0] == "6" and desk.have_close("name", "whole")
    kept = json.loads((desk.out / "name-000001-state" / "manifest.json").read_text())
    assert kept["position"]["step"] == 3 and "run" not in kept


def test_a_run_over_the_remains_of_an_older_one(desk: Desk, kill: Callable[[str], None], capsys: Caught) -> None:
    saving = ("--max_train_epochs", 4, "--save_every_n_epochs", 1, "--save_state")
    desk.train("name", *saving)
    older = desk.steps("name")[1]
    for path in (desk.folder / "clips").glob("*.txt"):
        path.write_text(path.read_text().replace("moves", "walks"))
    desk.cache()
    capsys.readouterr()
    desk.train("name", *saving, "--resume", "auto", expect=2)
    assert re.search(r"3 files with different captions \(.*red_circle.*\)", capsys.readouterr().err)
    kill("-000001")
    desk.train("name", *saving, "--network_dim", 2, expect=130)
    told = capsys.readouterr().err
    assert "WARNING" in told and "name-000003.safetensors" in told and "--resume" in told and "--output_name" in told
    desk.train("name", *saving, "--network_dim", 2, "--resume", "auto")
    assert f"resumed from {desk.out / 'name-000001-state'}" in capsys.readouterr().err
    moments = ("-000001", "-000002", "-000003", "")
    assert [desk.steps(f"name{moment}")[0] for moment in moments] == ["3", "6", "9", "12"]
    assert {desk.steps(f"name{moment}")[1] for moment in moments} == {desk.steps("name")[1]} != {older}
    desk.train("name", *saving, "--network_dim", 2, "--resume", "auto")
    assert "nothing is left to train" in capsys.readouterr().err


def test_a_fresh_run_that_was_killed_before_it_saved_begins_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: Caught
) -> None:
    saving = ("--max_train_epochs", 2, "--save_every_n_epochs", 1, "--save_state")
    desk.train("name", *saving)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wan_train.training.loop.take_step", killed)
    desk.train("name", *saving, "--learning_rate", 1e-3, expect=130)
    monkeypatch.undo()
    capsys.readouterr()
    desk.train("name", *saving, "--learning_rate", 1e-3, "--resume", "auto")
    told = capsys.readouterr().err
    assert "saved no state" in told and "name-000001-state" in told and "starting from scratch" in told
    desk.train("other", "--max_train_epochs", 2, "--learning_rate", 1e-3)
    assert desk.have_same("name", "other")


def test_another_video_of_the_same_name(desk: Desk, capsys: Caught) -> None:
    desk.train("name", "--max_train_steps", 2, "--save_state")
    clips = desk.folder / "clips"
    shutil.copy(clips / "blue_square.mp4", clips / "red_circle.mp4")
    desk.cache()
    words = ("--max_train_steps", 4, "--resume", desk.out / "name-state")
    capsys.readouterr()
    for more in ((), ("--trust_cache",)):
        desk.train("name", *words, *more, expect=2)
        assert re.search(r"1 file with a different video or image \(red_circle\)\..*anyway", capsys.readouterr().err)
    (clips / "green_triangle.mp4").rename(clips / "yellow.mp4")
    (clips / "green_triangle.txt").rename(clips / "yellow.txt")
    desk.cache()
    desk.train("name", *words, expect=2)
    told = capsys.readouterr().err
    assert "1 file that is new (yellow)" in told and "1 file that is missing (green_triangle)" in told
    assert "samples of the dataset was" not in told
    desk.train("name", *words, "--resume_anyway")
    assert "despite differences: the dataset has" in capsys.readouterr().err


def test_an_end_becomes_an_epoch_when_the_run_goes_further(desk: Desk, kill: Callable[[str], None]) -> None:
    saving = ("--save_every_n_epochs", 1, "--save_state", "--ema_decay", 0.9)
    desk.train("whole", "--max_train_epochs", 5, *saving)
    desk.train("name", "--max_train_epochs", 2, *saving)
    kill("-000003")
    desk.train("name", "--max_train_epochs", 4, *saving, "--resume", desk.out / "name-state", expect=130)
    assert desk.steps("name")[0] == "6"
    desk.train("name", "--max_train_epochs", 4, *saving, "--resume", "auto")
    desk.train("name", "--max_train_epochs", 5, *saving, "--resume", "auto")
    for ending in (".safetensors", "-state"):
        assert desk.names(f"name*{ending}") == {path.replace("whole", "name") for path in desk.names(f"whole*{ending}")}
    for moment in ("-000001", "-000002", "-000003", "-000004", "", "-000002-ema", "-000004-ema", "-ema"):
        assert desk.have_same(f"name{moment}", f"whole{moment}"), moment
    positions = [
        json.loads((desk.out / f"name{moment}-state" / "manifest.json").read_text())["position"]["step"]
        for moment in ("-000001", "-000002", "-000003", "-000004", "")
    ]
    assert positions == [3, 6, 9, 12, 15]


def test_an_end_within_an_epoch_is_resumed_there(desk: Desk) -> None:
    desk.train("whole", "--max_train_steps", 7)
    desk.train("name", "--max_train_steps", 4, "--save_state_on_train_end")
    desk.train("name", "--max_train_steps", 7, "--save_state_on_train_end", "--resume", "auto")
    assert desk.have_same("name", "whole")
    assert desk.names("name-*.safetensors") == {"name-step00000004.safetensors"}
    assert desk.steps("name-step00000004")[0] == "4"


def test_a_lora_file_is_no_state(desk: Desk, capsys: Caught) -> None:
    desk.train("name", "--max_train_steps", 1, "--save_state")
    lora = desk.out / "name.safetensors"
    words = ("--dit", desk.folder / DIT, "--dataset_config", desk.folder / "data.toml", "--resume", lora)
    words = (*words, "--output_dir", desk.out, "--output_name", "more")
    capsys.readouterr()
    assert run(TOOL, [str(word) for word in (*OPTIONS, *words)]) == 2
    told = capsys.readouterr().err
    assert "is a LoRA file" in told and f"--resume {desk.out / 'name-state'}" in told and "loading" not in told
