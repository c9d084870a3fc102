"""What is there under the names of a run: that of other runs stays apart, its own earlier end gets another name."""

import logging
import os
from pathlib import Path

import pytest
import torch

from tests.unit.training.saving.states import RUN, anonymous, save, saving
from wan_train.shards import files_of
from wan_train.storage import read_header, save_tensors
from wan_train.tensor_writer import Row, write_set
from wan_train.training.saving.checkpoints import outlived
from wan_train.training.saving.earlier import End, is_of_run, keep_earlier_end, warn_of_others
from wan_train.training.saving.identity import Identity
from wan_train.training.saving.settings import SaveSettings
from wan_train.training.saving.state import Position, open_state

OTHER = Identity(2, 200.0)
END = End(RUN, seed=7, position=Position(40, 5, 0), epoch_steps=10)


def write(path: Path, step: int | None, run: Identity = RUN, limit: int | None = None) -> None:
    said = {} if step is None else {"ss_steps": str(step), "ss_session_id": str(run.session)}
    tensors = {name: torch.full((100,), float(step or 0)) for name in "abc"}
    if limit is None:
        save_tensors(path, tensors, said)
    else:
        write_set(path, {name: Row((100,), torch.float32) for name in tensors}, tensors, said, limit)


def kept(folder: Path, *, with_state: bool = True) -> set[str]:
    return {path.name for path in keep_earlier_end(saving(folder), END, (None,), with_state=with_state)}


def test_an_earlier_end_gets_the_name_of_its_epoch_or_step(tmp_path: Path) -> None:
    for name, step in (("name", 20), ("name-ema", 20)):
        write(tmp_path / f"{name}.safetensors", step)
    save(tmp_path / "name-state", 20)
    assert kept(tmp_path) == {"name-000002.safetensors", "name-000002-ema.safetensors", "name-000002-state"}
    # All of it stays under the final name too, until that is replaced; a run that is killed before keeps it once.
    assert open_state(tmp_path / "name-state").position == open_state(tmp_path / "name-000002-state").position
    assert kept(tmp_path) == set() and len(list(tmp_path.iterdir())) == 6


def test_it_takes_no_name_that_something_has(tmp_path: Path) -> None:
    write(tmp_path / "name.safetensors", 20)
    write(tmp_path / "name-000002.safetensors", 20, OTHER)
    assert kept(tmp_path) == {"name-step00000020.safetensors"}
    assert is_of_run(tmp_path / "name-000002.safetensors", OTHER.session)
    assert kept(tmp_path) == set()


def test_within_an_epoch_it_is_named_by_its_step(tmp_path: Path) -> None:
    write(tmp_path / "name.safetensors", 25)
    save(tmp_path / "name-state", 25)
    assert kept(tmp_path, with_state=False) == {"name-step00000025.safetensors"}


@pytest.mark.parametrize(("step", "run"), [(20, OTHER), (40, RUN), (50, RUN)])
def test_what_is_no_earlier_end_of_this_run_is_not_kept(tmp_path: Path, step: int, run: Identity) -> None:
    write(tmp_path / "name.safetensors", step, run)
    save(tmp_path / "name-state", step, run=run)
    assert kept(tmp_path) == set()


def test_files_that_do_not_say_of_which_run_they_are_go_with_the_state(tmp_path: Path) -> None:
    write(tmp_path / "name.safetensors", None)
    assert kept(tmp_path) == set()
    anonymous(save(tmp_path / "name-state", 20))
    assert kept(tmp_path) == {"name-000002.safetensors", "name-000002-state"}
    assert kept(tmp_path) == set()


@pytest.mark.parametrize("links", [True, False])
def test_shards_are_kept_with_an_index_of_their_own(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, target = tmp_path / "name.safetensors", tmp_path / "name-000002.safetensors"
    write(path, 20, limit=500)
    save(tmp_path / "name-state", 20)
    if not links:

        def refused(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("wan_train.training.saving.earlier.os.link", refused)
    shards = {f"name-000002-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    assert kept(tmp_path) == {*shards, "name-000002.safetensors.index.json", "name-000002-state"}
    write(path, 40, limit=500)
    for source, step in ((target, "20"), (path, "40")):
        header = read_header(files_of(source)[-1])
        assert header.metadata["ss_steps"] == step and {*header.shapes} == {*"abc"}
    assert open_state(tmp_path / "name-000002-state").position.step == 20


def test_files_of_another_run_neither_count_nor_give_way(tmp_path: Path) -> None:
    settings = SaveSettings(output_dir=str(tmp_path), output_name="name", save_last_n_epochs=1)
    for epoch, run in ((1, OTHER), (2, RUN), (3, OTHER), (4, RUN)):
        write(tmp_path / f"name-00000{epoch}.safetensors", epoch, run)
        save(tmp_path / f"name-00000{epoch}-state", epoch, run=run)
    write(tmp_path / "name-000001-ema.safetensors", None)
    write(tmp_path / "name-000002-ema.safetensors", None)
    gone = outlived(settings, epoch=4, step=4, is_own=lambda path: is_of_run(path, RUN.session))
    assert {path.name for path in gone} == {
        *("name-000002.safetensors", "name-000002-state", "name-000001-ema.safetensors")
    }


def test_what_will_be_replaced_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("wan_train_log"), "propagate", True)
    for name in ("name-2.safetensors", "name2.safetensors", "name.config.toml"):
        (tmp_path / name).touch()
    warn_of_others(saving(tmp_path), OTHER, None)
    assert caplog.text == ""
    own = ("name.safetensors", "name-best.safetensors", "name_high_noise-000002-ema.safetensors")
    for name in own:
        (tmp_path / name).touch()
    state = open_state(save(tmp_path / "name-000002-state", 20))
    warn_of_others(saving(tmp_path), RUN, state)
    assert caplog.text == ""  # resumed as itself
    warn_of_others(saving(tmp_path), OTHER, None)
    assert all(name in caplog.text for name in (*own, "name-000002-state", f"--resume {state.folder}"))
    assert "name-2" not in caplog.text and "name2" not in caplog.text and "config" not in caplog.text
    caplog.clear()
    warn_of_others(saving(tmp_path), OTHER, state)  # a branch
    assert "name.safetensors" in caplog.text and "to resume an earlier run" not in caplog.text


def test_shards_that_a_kill_left_without_their_index_are_completed(tmp_path: Path) -> None:
    write(tmp_path / "name.safetensors", 20, limit=500)
    os.link(tmp_path / "name-00001-of-00003.safetensors", tmp_path / "name-000002-00001-of-00003.safetensors")
    assert len(kept(tmp_path)) == 4 and kept(tmp_path) == set()
    assert {*read_header(tmp_path / "name-000002.safetensors.index.json").shapes} == {*"abc"}
