"""States on disk: whole or absent, exact, told apart from others."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dataset.config import DatasetConfig
from dataset.order import SampleKey
from wan_train.cli import InputError, parse
from wan_train.training.checkpoints import FILE, STATE, of_epoch, of_step, outlived, path_of
from wan_train.training.ema import Ema
from wan_train.training.resume import Trained, chosen_seed, configuration, require_same
from wan_train.training.save_settings import SaveSettings
from wan_train.training.settings import TrainSettings
from wan_train.training.state import Position, load_state, newest_state, open_state, save_state


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(3, 4, generator=generator)) for name in ("a.down.weight", "a.up.weight")}


def save(folder: Path, step: int = 3, seed: int = 0, **parts: Any) -> Path:
    save_state(
        folder,
        Position(step, 2, 1),
        seed=7,
        configuration={"--network_dim": "4"},
        parameters=parameters(seed),
        parts=parts,
    )
    return folder


def settings_of(folder: Path, *more: str) -> TrainSettings:
    words = ["--dit", "d", "--dataset_config", "c", "--output_dir", str(folder), "--output_name", "name", *more]
    return parse(TrainSettings, words)


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


def test_the_newest_whole_state_of_this_name(tmp_path: Path) -> None:
    settings = SaveSettings(output_dir=str(tmp_path), output_name="name")
    assert newest_state(settings) is None
    for folder, step in (("name-step00000004-state", 4), ("name-000002-state", 6), ("name-other-state", 9)):
        save(tmp_path / folder, step)
    torn = save(tmp_path / "name-step00000008-state", 8)
    (torn / "run.pt").write_bytes(b"half")
    unfinished = save(tmp_path / "name-step00000010-state", 10)
    (unfinished / "manifest.json").unlink()
    found = newest_state(settings)
    assert found is not None and found.folder.name == "name-000002-state"


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
    with pytest.raises(InputError, match="is not there"):
        open_state(tmp_path / "absent")


def test_another_network_is_refused(tmp_path: Path) -> None:
    state = open_state(save(tmp_path / "name-state"))
    with pytest.raises(InputError, match="another network"):
        load_state(state, {"a.down.weight": nn.Parameter(torch.zeros(2, 2))})


def test_which_differences_count(tmp_path: Path) -> None:
    whole = Trained(
        [DatasetConfig(tmp_path, 1, True, tmp_path, tmp_path)], [SampleKey("clip", 0)], ["a dog"], 100, "no"
    )

    def of(*more: str, processes: int = 1, **changes: Any) -> dict[str, str]:
        return configuration(settings_of(tmp_path, *more), replace(whole, **changes), num_processes=processes)

    def dataset(**changes: Any) -> dict[str, str]:
        return of(configs=[replace(whole.configs[0], **changes)])

    plain = of()
    same = (
        of("--gradient_checkpointing", "--blocks_to_swap", "3"),
        of("--max_train_steps", "9", steps=9),
        of("--save_every_n_steps", "5", "--sdpa"),
        of("--dit", "elsewhere/d"),
        of("--mixed_precision", "no"),
        dataset(cache_directory=tmp_path / "moved"),
    )
    assert all(each == plain for each in same)
    assert of(processes=2) == of("--gradient_accumulation_steps", "2")
    others = (
        *(of("--learning_rate", "1"), of("--fp8_base"), of("--network_dim", "3"), of(processes=2)),
        *(of(keys=[SampleKey("b", 0)]), of(mixed_precision="bf16"), of(prior_captions=["a cat"])),
        of("--prior_loss_weight", "2", "--prior_captions", "kept.txt"),
        *(dataset(batch_size=2), dataset(weight=2.0), dataset(loss_weight=0.5), dataset(flip_augment=True)),
    )
    assert all(other != plain for other in others)
    for option in (("--lr_scheduler", "cosine"), ("--lr_warmup_steps", "5%")):
        assert of(*option, steps=9) != of(*option)
    assert of("--lr_warmup_steps", "5") == of("--lr_warmup_steps", "5%")


def test_differences_are_listed_or_warned_of(tmp_path: Path) -> None:
    state = open_state(save(tmp_path / "name-state"))
    require_same(state, {"--network_dim": "4"}, anyway=False)
    with pytest.raises(InputError, match=r"--network_dim was 4, is 8.*--resume_anyway"):
        require_same(state, {"--network_dim": "8"}, anyway=False)
    require_same(state, {"--network_dim": "8"}, anyway=True)


def test_the_seed_is_the_states(tmp_path: Path) -> None:
    state = open_state(save(tmp_path / "name-state"))
    assert chosen_seed(None, state) == chosen_seed(7, state) == 7
    assert (chosen_seed(3, None), chosen_seed(None, None)) == (3, None)
    with pytest.raises(InputError, match="--seed 8 is not the 7"):
        chosen_seed(8, state)


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
