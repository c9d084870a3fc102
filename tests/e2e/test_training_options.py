"""What options of the trainer do to a run, each seen in what the run leaves. The runs share this process."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tiny.make import DIT, T5, VAE
from wan_train.cli import run
from wan_train.errors import InputError
from wan_train.file_names import HOST
from wan_train.storage import save_parts, save_tensors
from wan_train.training.accelerator import make_accelerator
from wan_train.training.settings import TOOL

Tool = Callable[..., CompletedProcess[str]]
Caught = pytest.CaptureFixture[str]


class Shop:
    """A folder with caches, and runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def train(self, name: str, *more: object, expect: int = 0, data: str = "data.toml", launched: bool = False) -> None:
        """`launched`: the precision is left to the launcher."""
        AcceleratorState._reset_state(reset_partial_state=True)
        words: tuple[object, ...] = (
            *("--task", "t2v-1.3B", "--dit", self.folder / DIT, "--dataset_config", self.folder / data),
            *(() if launched else ("--mixed_precision", "no")),
            *("--learning_rate", 2e-2, "--sdpa", "--trust_cache", "--log_with", "none"),
            *("--network_module", "networks.lora_wan", "--network_dim", 4, "--network_alpha", 4, "--seed", 1),
            *("--max_data_loader_n_workers", 0, "--max_train_steps", 6),
            *("--output_dir", self.folder / "out", "--output_name", name),
        )
        assert run(TOOL, [str(word) for word in (*words, *more)]) == expect
        gc.collect()

    def rows(self, name: str, what: str = "loss") -> list[float]:
        lines = (self.folder / "out" / f"{name}.metrics.jsonl").read_text().splitlines()
        return [row[what] for row in map(json.loads, lines) if what in row]

    def lora(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "out" / f"{name}.safetensors")

    def length(self, name: str) -> float:
        """The norm of what was learnt."""
        pairs = self.lora(name)
        ups = {key: tensor for key, tensor in pairs.items() if key.endswith("lora_up.weight")}
        changes = [up @ pairs[key.replace("lora_up", "lora_down")] for key, up in ups.items()]
        return float(torch.stack([change.norm() for change in changes]).norm())


@pytest.fixture(scope="module")
def shop(tiny: Path, tmp_path_factory: pytest.TempPathFactory, run_tool: Tool) -> Shop:
    folder = tmp_path_factory.mktemp("options") / "all"
    shutil.copytree(tiny, folder)
    data = folder / "data.toml"
    data.write_text(data.read_text().replace(str(tiny), str(folder)))
    run_tool("wan_cache_latents.py", "--dataset_config", data, "--vae", folder / VAE)
    run_tool("wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--t5", folder / T5)
    made = Shop(folder)
    made.train("plain")
    return made


def spoiled(shop: Shop) -> str:
    """A dataset of which one clip's latents are no numbers."""
    folder = shop.folder / "spoiled"
    if not folder.exists():
        shutil.copytree(shop.folder / "cache", folder)
        path = next(folder.glob("red_circle_0*_wan.safetensors"))
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = {
            key: torch.full_like(t, torch.nan) if key.startswith("latents") else t for key, t in load_file(path).items()
        }
        save_file(tensors, path, metadata)
        text = (shop.folder / "data.toml").read_text()
        (shop.folder / "spoiled.toml").write_text(text.replace(str(shop.folder / "cache"), str(folder)))
    return "spoiled.toml"


def test_a_loss_that_is_no_number_stops_the_run(shop: Shop, capsys: Caught) -> None:
    shop.train("nan", "--save_every_n_steps", 1, expect=1, data=spoiled(shop))
    said = capsys.readouterr().err
    assert "the loss is nan at step" in said and "red_circle" in said and " at t 0." in said
    assert "--skip_nonfinite" in said and "Traceback" not in said
    for path in (shop.folder / "out").glob("nan-step*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_some_such_steps_may_be_left_out(shop: Shop, capsys: Caught) -> None:
    shop.train("skip", "--skip_nonfinite", 2, data=spoiled(shop))
    assert "step skipped (2 of at most 2)" in capsys.readouterr().err
    assert all(tensor.isfinite().all() for tensor in shop.lora("skip").values())
    assert len(shop.rows("skip", "step")) == 6


def test_a_loss_scale_that_is_too_high_is_lowered(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 on a GPU, here with its scaler on a CPU in float32: the first steps overflow; no fault of the run."""

    def with_scaler(*settings: Any) -> Accelerator:
        accelerator = make_accelerator(*settings)
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=2.0**127), True
        return accelerator

    monkeypatch.setattr("wan_train.training.main.make_accelerator", with_scaler)
    text = (shop.folder / "data.toml").read_text()
    (shop.folder / "heavy.toml").write_text(text + "loss_weight = 16.0\n")  # float32 ends at 2**128
    half = ("--mixed_precision", "fp16", "--max_train_steps", 16, "--save_state")
    shop.train("half", *half, "--save_every_n_steps", 8, data="heavy.toml")
    norms = shop.rows("half", "grad_norm")
    left_out = [norm is None for norm in norms]
    assert left_out == sorted(left_out, reverse=True) and 0 < sum(left_out) < 8
    assert shop.length("half") > 0
    state = torch.load(shop.folder / "out" / "half-state" / "run.pt", weights_only=True)
    assert state["scaler"]["scale"] == 2.0 ** (127 - sum(left_out))
    assert state["skipped"] == {"count": 0}
    shop.train("half", *half, "--resume", shop.folder / "out" / "half-step00000008-state", data="heavy.toml")
    assert shop.rows("half", "grad_norm") == norms


def test_the_average_is_saved_beside(shop: Shop) -> None:
    shop.train("ema", "--ema_decay", 0.5)
    ours, plain, average = shop.lora("ema"), shop.lora("plain"), shop.lora("ema-ema")
    assert all(torch.equal(ours[key], plain[key]) for key in plain)
    assert any(not torch.equal(average[key], plain[key]) for key in plain)
    assert shop.length("ema-ema") < shop.length("plain")


def test_norms_stay_below_their_limit(shop: Shop) -> None:
    shop.train("scaled", "--scale_weight_norms", 0.05)
    assert shop.length("scaled") < 0.05 * len(shop.lora("plain")) ** 0.5 < shop.length("plain")


def test_what_was_known_is_kept(shop: Shop) -> None:
    captions = shop.folder / "kept.txt"
    captions.write_text("a green triangle moves to the left\n")
    shop.train("kept", "--prior_captions", captions, "--prior_loss_weight", 20, "--t5", shop.folder / T5)
    assert shop.length("kept") < shop.length("plain")
    # Before anything is learnt nothing differs from what was known.
    assert shop.rows("kept")[0] == pytest.approx(shop.rows("plain")[0])
    shop.train("alone", "--prior_captions", captions, expect=2)


def test_regularisation_clips_count_as_their_dataset_says(shop: Shop) -> None:
    text = (shop.folder / "data.toml").read_text()
    (shop.folder / "reg.toml").write_text(text + "is_reg = true\nloss_weight = 0.25\n")
    shop.train("reg", data="reg.toml")
    assert shop.rows("reg")[0] == pytest.approx(0.25 * shop.rows("plain")[0])
    assert shop.rows("reg", "grad_norm")[0] == pytest.approx(0.25 * shop.rows("plain", "grad_norm")[0], rel=1e-4)


def test_training_starts_from_another_lora(shop: Shop) -> None:
    out = shop.folder / "out"
    shop.train("further", "--network_weights", out / "plain.safetensors", "--max_train_steps", 1)
    shop.train("merged", "--base_weights", out / "plain.safetensors", "--max_train_steps", 1)
    assert shop.rows("further")[0] == pytest.approx(shop.rows("merged")[0], rel=1e-4)
    assert shop.rows("further")[0] < shop.rows("plain")[0]
    shop.train(
        "nothing", "--base_weights", out / "plain.safetensors", "--base_weights_multiplier", 0.0, "--max_train_steps", 1
    )
    assert shop.rows("nothing")[0] == pytest.approx(shop.rows("plain")[0])


def test_patterns_choose_what_is_trained(shop: Shop) -> None:
    shop.train("few", "--network_args", "exclude_patterns=[r'.*ffn.*']", "--max_train_steps", 1)
    assert not any("ffn" in key for key in shop.lora("few")) and len(shop.lora("few")) > 0
    shop.train("none", "--network_args", "exclude_patterns=[r'.*no_such_module.*']", expect=2)


def test_huber_and_weighting_reach_the_loss(shop: Shop) -> None:
    shop.train("huber", "--loss_type", "huber", "--huber_c", 1e-3, "--max_train_steps", 1)
    assert shop.rows("huber")[0] < 0.01 * shop.rows("plain")[0]
    shop.train("cosmap", "--weighting_scheme", "cosmap", "--max_train_steps", 1)
    assert shop.rows("cosmap")[0] != shop.rows("plain")[0]


def test_noise_levels_stay_in_their_range(shop: Shop) -> None:
    shop.train("range", "--min_timestep", 875, "--max_timestep", 1000)
    assert {name for row in shop.rows("range", "strata") for name in row} == {"t7"}


def test_timesteps_are_shown_without_a_model(shop: Shop, capsys: Caught) -> None:
    shop.train("shown", "--show_timesteps", "console", "--dit", "absent.safetensors", "--timestep_sampling", "shift")
    assert len(capsys.readouterr().out.splitlines()) > 10
    assert not (shop.folder / "out" / "shown.safetensors").exists()


def test_the_best_by_held_out_loss_is_kept(shop: Shop) -> None:
    shop.train("best", "--validation_split", 0.4, "--validate_every_n_steps", 2)
    measured = shop.rows("best", "validation")
    assert [row["loss"] for row in measured] and len(measured) == 4  # before the first step, 2, 4 and 6
    with safe_open(shop.folder / "out" / "best-best.safetensors", "pt") as file:
        best_step = int(file.metadata()["ss_steps"])
    losses = dict(zip((0, 2, 4, 6), (row["loss"] for row in measured), strict=True))
    assert best_step == min(losses, key=losses.__getitem__)


def test_early_stop(shop: Shop, capsys: Caught) -> None:
    """Nothing is learnt at a rate of zero, so that the second look at the same clips is in vain, and the third."""
    held_out = ("--validation_config", shop.folder / "data.toml", "--validate_every_n_steps", 1)
    shop.train("early", *held_out, "--early_stop", 2, "--learning_rate", 0)
    assert "stopping early" in capsys.readouterr().err
    assert len(shop.rows("early")) == 2 and (shop.folder / "out" / "early.safetensors").exists()


def test_old_files_give_way(shop: Shop) -> None:
    shop.train("last", "--save_every_n_steps", 1, "--save_last_n_steps", 2, "--save_state")
    out = shop.folder / "out"
    assert sorted(path.name for path in out.glob("last-step*")) == [
        "last-step00000005-state",
        "last-step00000005.safetensors",
    ]  # of the last two steps, 5 and 6, the second has the final name


def test_the_settings_that_are_left_make_the_run_again(shop: Shop) -> None:
    config = shop.folder / "out" / "plain.config.toml"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert run(TOOL, ["--config_file", str(config), "--output_name", "again"]) == 0
    ours, plain = shop.lora("again"), shop.lora("plain")
    assert all(torch.equal(ours[key], plain[key]) for key in plain)


def test_the_launchers_precision_is_among_the_settings_that_are_left(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    shop.train("launched", "--max_train_steps", 1, launched=True)
    assert 'mixed_precision = "bf16"' in (shop.folder / "out" / "launched.config.toml").read_text()


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_files_have_the_precision_that_is_asked_for(shop: Shop, precision: str, dtype: torch.dtype) -> None:
    shop.train(precision, "--save_precision", precision, "--max_train_steps", 1)
    assert {t.dtype for key, t in shop.lora(precision).items() if not key.endswith("alpha")} == {dtype}


def test_the_files_say_what_users_say_of_them(shop: Shop) -> None:
    told = {
        "title": "Circles",
        "author": "somebody",
        "description": "a circle",
        "license": "CC0",
        "tags": "a,b",
        "reso": "96x64",
        "arch": "wan/x",
    }
    words = [word for name, value in told.items() for word in (f"--metadata_{name}", value)]
    shop.train("told", *words, "--training_comment", "first try", "--max_train_steps", 1)
    with safe_open(shop.folder / "out" / "told.safetensors", "pt") as file:
        rows = file.metadata()
    named = {"reso": "resolution", "arch": "architecture"}
    assert {name: rows[f"modelspec.{named.get(name, name)}"] for name in told} == told
    assert rows["ss_training_comment"] == "first try"


def test_states_have_a_number_of_their_own_and_one_of_the_end(shop: Shop, capsys: Caught) -> None:
    """A state of each of the last two epochs, files of all; at the end alone, where that is asked for."""
    out, often = shop.folder / "out", ("--max_train_epochs", 4, "--save_every_n_epochs", 1, "--save_state")
    shop.train("epochs", *often, "--save_last_n_epochs_state", 2)
    assert len(list(out.glob("epochs-0*.safetensors"))) == 3
    assert sorted(path.name for path in out.glob("epochs-*state")) == [
        *("epochs-000002-state", "epochs-000003-state", "epochs-state")
    ]
    at_end = ("--save_every_n_steps", 2, "--save_state_on_train_end")
    shop.train("end", *at_end)
    assert [path.name for path in out.glob("end*-state")] == ["end-state"]
    before = (out / "end.safetensors").read_bytes()
    shop.train("end", *at_end, "--resume", "auto")  # as a script that repeats it would
    assert "nothing is left to train" in capsys.readouterr().err
    assert (out / "end.safetensors").read_bytes() == before


def test_another_batch_size_is_not_gone_on_with(shop: Shop, capsys: Caught) -> None:
    """The batches of an epoch that were taken would be others."""
    shop.train("sized", "--save_state")
    text = (shop.folder / "data.toml").read_text()
    (shop.folder / "pairs.toml").write_text(text.replace("batch_size = 1", "batch_size = 2"))
    shop.train("sized", "--resume", "auto", "--max_train_steps", 8, expect=2, data="pairs.toml")
    assert "batch_size of dataset 1 was 1, is 2" in capsys.readouterr().err


def test_options_of_old_commands(shop: Shop, capsys: Caught) -> None:
    idle = ("--disable_numpy_memmap", "--img_in_txt_in_offloading", "--guidance_scale", 5, "--dynamo_backend", "NO")
    shop.train("old", *idle)
    ours, plain = shop.lora("old"), shop.lora("plain")
    assert all(torch.equal(ours[key], plain[key]) for key in plain)
    shop.train("compiled", "--dynamo_backend", "INDUCTOR", expect=2)
    assert "--compile --compile_backend inductor" in capsys.readouterr().err


def test_no_room_for_the_best_names_the_state_to_go_on_from(
    shop: Shop, capsys: Caught, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *others: Any) -> None:
        if path.stem.endswith("-best"):
            raise InputError(f"cannot write {path}: No space left on device")
        save_tensors(path, *others)

    monkeypatch.setattr("wan_train.training.saving.checkpoints.save_tensors", full)
    held_out = ("--validation_config", shop.folder / "data.toml", "--validate_every_n_steps", 3)
    shop.train("tight", *held_out, "--save_every_n_steps", 2, "--save_state", expect=1)
    said = capsys.readouterr().err
    assert "tight-best" in said and f"resume from {shop.folder / 'out' / 'tight-step00000002-state'}" in said


def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(
    shop: Shop, capsys: Caught, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, parts: object) -> None:
        if "step00000004" in str(path):
            raise OSError(28, "No space left on device")
        save_parts(path, parts)

    monkeypatch.setattr("wan_train.training.saving.state.save_parts", full)
    out = shop.folder / "out"
    (out / f".full-step.{HOST}~999999~abcdefgh").mkdir()  # of a run that was killed
    shop.train("full", "--save_every_n_steps", 2, "--save_state", expect=1)
    said = capsys.readouterr().err
    assert "No space left on device" in said and f"resume from {out / 'full-step00000002-state'}" in said
    assert not [path for path in out.iterdir() if path.name.startswith(".full")]
    monkeypatch.undo()
    shop.train("full", "--save_every_n_steps", 2, "--save_state", "--resume", "auto")
    ours, plain = shop.lora("full"), shop.lora("plain")
    assert all(torch.equal(ours[key], plain[key]) for key in plain)
