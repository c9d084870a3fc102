"""States on disk: whole or absent, exact, told apart from others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from networks.moments import of_epoch, of_step
from tests.unit.training.saving.states import parameters, save
from wan_train.errors import InputError
from wan_train.storage import save_tensors
from wan_train.training.optimizing.ema import Ema
from wan_train.training.saving.checkpoints import FILE, STATE, outlived, path_of
from wan_train.training.saving.settings import SaveSettings
from wan_train.training.saving.state import Position, load_state, open_state


def test_a_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(5)}}, "param_groups": [{"lr": 0.1}]}
    state = open_state(save(tmp_path / "name-state", optimizer=optimizer, average={"values": [0.1, 0.2]}))
    assert (state.position, state.seed) == (Position(3, 2, 1), 7)
    fresh = parameters(seed=5)
    parts = load_state(state, fresh)
    assert all(torch.equal(fresh[name], p) for name, p in parameters().items())
    assert torch.equal(parts["optimizer"]["state"][0]["exp_avg"], optimizer["state"][0]["exp_avg"])
    assert parts["average"] == {"values": [0.1, 0.2]}


def test_saving_again_replaces_the_whole(tmp_path: Path) -> None:
    save(tmp_path / "name-state", step=3)
    save(tmp_path / "name-state", step=4, seed=1)
    state = open_state(tmp_path / "name-state")
    assert state.position.step == 4
    assert [path.name for path in tmp_path.iterdir()] == ["name-state"]


def test_a_full_disk_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "name-state", step=3)

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"cannot write .*name-state.*failed writing"):
        save(tmp_path / "name-state", step=4)
    assert open_state(tmp_path / "name-state").position.step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["name-state"]


def test_no_room_for_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "name-state", step=3)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left on device"):
        save(tmp_path / "name-state", step=4)
    assert open_state(tmp_path / "name-state").position.step == 3


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
        (lambda folder: (folder / "adapter.safetensors").unlink(), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text(json.dumps({"sizes": {}})), "cannot be read"),
    ],
)
def test_what_is_no_state_is_refused(tmp_path: Path, break_it: Any, message: str) -> None:
    folder = save(tmp_path / "name-state")
    break_it(folder)
    with pytest.raises(InputError, match=message):
        open_state(folder)
    with pytest.raises(InputError, match="does not exist"):
        open_state(tmp_path / "absent")


def test_what_was_given_instead_of_a_state_is_named(tmp_path: Path) -> None:
    state = save(tmp_path / "l-state")
    lora, alone, whole, text = (
        tmp_path / name for name in ("l.safetensors", "m.safetensors", "w.safetensors", "t.txt")
    )
    for path in (lora, alone):
        save_tensors(path, {"lora_unet_blocks_0_ffn_0.lora_down.weight": torch.zeros(1, 2)})
    save_tensors(whole, {"blocks.0.ffn.0.weight": torch.zeros(1, 2)})
    text.write_text("")
    for path, message in (
        (lora, f"--resume {lora} is a LoRA file.*--resume {state}.*--network_weights {lora}"),
        (alone, f"--resume {alone} is a LoRA file.*--resume FOLDER-state.*--network_weights {alone}"),
        (whole, f"--resume {whole} is a checkpoint.*--dit {whole}"),
        (text, f"--resume {text} is a file, .*--resume FOLDER-state"),
        (state / "run.pt", f"is a file of a state: give its folder, --resume {state}"),
        (tmp_path, f"is not a state, but contains 1 .*{state.name}.*give one of them"),
    ):
        with pytest.raises(InputError, match=message):
            open_state(path)


def test_another_network_is_refused(tmp_path: Path) -> None:
    state = open_state(save(tmp_path / "name-state"))
    with pytest.raises(InputError, match="a different network"):
        load_state(state, {"a.down.weight": nn.Parameter(torch.zeros(2, 2))})


def test_what_newer_files_replace(tmp_path: Path) -> None:
    settings = SaveSettings(
        output_dir=str(tmp_path),
        output_name="name",
        save_last_n_epochs=2,
        save_last_n_steps=10,
        save_last_n_steps_state=4,
    )
    for epoch in (1, 2, 3, 9):
        path_of(settings, of_epoch(epoch), FILE).touch()
        path_of(settings, of_epoch(epoch), STATE).mkdir()
    for step in (5, 10, 15, 20):
        path_of(settings, of_step(step), FILE).touch()
        path_of(settings, of_step(step), STATE).mkdir()
    path_of(settings, "", FILE).touch()
    (tmp_path / "name2-000001.safetensors").touch()
    gone = sorted(path.name for path in outlived(settings, epoch=3, step=20))
    assert gone == [
        "name-000001-state",
        "name-000001.safetensors",
        "name-step00000005-state",
        "name-step00000005.safetensors",
        "name-step00000010-state",
        "name-step00000010.safetensors",
        "name-step00000015-state",
    ]
    assert outlived(SaveSettings(output_dir=str(tmp_path), output_name="name"), epoch=3, step=20) == []


def test_epochs_in_shards_are_counted_once(tmp_path: Path) -> None:
    settings = SaveSettings(output_dir=str(tmp_path), output_name="name", save_last_n_epochs=2)
    files: dict[int, set[str]] = {}
    for epoch in (1, 2, 3):
        for ending in ("", "-ema"):
            stem = f"name{of_epoch(epoch)}{ending}"
            shards = [f"{stem}-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
            files.setdefault(epoch, set()).update([*shards, f"{stem}.safetensors.index.json"])
        for name in files[epoch]:
            (tmp_path / name).touch()
    assert {path.name for path in outlived(settings, epoch=3, step=9)} == files[1]


def test_the_average_follows_and_gives_way() -> None:
    weight = nn.Parameter(torch.zeros(1))
    ema = Ema({"w": weight}, 0.5)
    expected, values = 0.0, (1.0, 2.0, -1.0, 4.0)
    for step, value in enumerate(values, start=1):
        weight.data.fill_(value)
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert float(ema.averages[weight]) == pytest.approx(expected)
    with ema.applied(lambda: None):
        assert float(weight) == float(ema.averages[weight])
    assert float(weight) == 4.0
    again = Ema({"w": weight}, 0.5)
    again.load_state_dict(ema.state_dict())
    for each in (ema, again):
        each.update()
    assert float(again.averages[weight]) == float(ema.averages[weight])
