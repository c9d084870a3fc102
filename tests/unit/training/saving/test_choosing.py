"""Which state `--resume` takes of those that are there."""

import json
import os
import shutil
from pathlib import Path

import pytest

from networks.moments import of_epoch
from tests.unit.training.saving.states import RUN, anonymous, save, saving, settings_of
from wan_train.errors import InputError
from wan_train.training.saving.choosing import choose, identity_of, newest_of, whole_states
from wan_train.training.saving.earlier import warn_of_others
from wan_train.training.saving.identity import Identity, read_identity, write_identity
from wan_train.training.saving.resume import find_state
from wan_train.training.saving.state import open_state


def chosen(folder: Path, name: str = "name") -> str | None:
    """The name of the state that `--resume auto` takes, with options that every state fits."""
    state = choose(saving(folder, name), lambda state: True)
    return None if state is None else state.folder.name


def test_the_newest_whole_state_of_this_name(tmp_path: Path) -> None:
    assert chosen(tmp_path) is None
    for folder, step in (("name-step00000004-state", 4), ("name-000002-state", 6), ("name-other-state", 9)):
        save(tmp_path / folder, step)
    torn = save(tmp_path / "name-step00000008-state", 8)
    (torn / "run.pt").write_bytes(b"half")
    unfinished = save(tmp_path / "name-step00000010-state", 10)
    (unfinished / "manifest.json").unlink()
    assert chosen(tmp_path) == "name-000002-state"
    found = newest_of(saving(tmp_path), RUN.session)
    assert found is not None and found.position.step == 6
    assert newest_of(saving(tmp_path), 2) is None


@pytest.mark.parametrize(
    "other",
    [
        *("ch-2-state", "ch3-state", "lora2-state", "cat-2024-state", "ch--000001-state", "ch-step5-state"),
        *("ch2-000004-state", "ch-0000001-state", "ch000001-state", "-state", "ch-000001-ema-state", "ch.state-state"),
    ],
)
def test_states_of_other_names_are_not_this_runs(tmp_path: Path, other: str) -> None:
    save(tmp_path / other, 50)
    assert chosen(tmp_path, "ch") is None
    save(tmp_path / "ch-000004-state", 4)
    assert chosen(tmp_path, "ch") == "ch-000004-state"
    assert chosen(tmp_path, other.removesuffix("-state")) == other


def test_numbers_may_have_more_digits_than_names_are_filled_up_to(tmp_path: Path) -> None:
    for name, step in (("ch-state", 1), ("ch-step00000500-state", 2), ("ch-1234567-state", 3)):
        save(tmp_path / name, step)
        assert chosen(tmp_path, "ch") == name


def test_a_fresh_run_is_not_misled_by_the_states_of_an_older_one(tmp_path: Path) -> None:
    older, newer = Identity(1, 100.0), Identity(2, 200.0)
    write_identity(saving(tmp_path), older)
    for epoch in (1, 2, 3):
        save(tmp_path / f"name{of_epoch(epoch)}-state", 10 * epoch, run=older)
    save(tmp_path / "name-state", 40, run=older)
    assert chosen(tmp_path) == "name-state"
    write_identity(saving(tmp_path), newer)
    assert chosen(tmp_path) is None  # it has saved nothing yet: it begins again
    save(tmp_path / "name-000001-state", 10, run=newer)
    assert chosen(tmp_path) == "name-000001-state"
    (tmp_path / "name.run.json").unlink()  # copied without it
    assert chosen(tmp_path) == "name-000001-state"


def test_a_run_that_was_resumed_keeps_its_identity(tmp_path: Path) -> None:
    save(tmp_path / "name-000001-state", 10, run=RUN)
    state = open_state(save(tmp_path / "name-000002-state", 20, run=RUN))
    kept = identity_of(state, saving(tmp_path))
    assert (kept.session, kept.started_at) == (RUN.session, RUN.started_at)
    assert identity_of(None, saving(tmp_path)).session != RUN.session


def test_what_leaves_later_states_behind_is_a_run_of_its_own(tmp_path: Path) -> None:
    first = open_state(save(tmp_path / "name-000001-state", 10, run=RUN))
    save(tmp_path / "name-000002-state", 20, run=RUN)
    branch = identity_of(first, saving(tmp_path))
    assert branch.session != RUN.session and branch.started_at > RUN.started_at
    write_identity(saving(tmp_path), branch)
    assert read_identity(saving(tmp_path)) == branch
    assert chosen(tmp_path) == "name-000001-state"  # killed before it saved: where it was resumed from
    save(tmp_path / "name-step00000015-state", 15, run=branch)
    assert chosen(tmp_path) == "name-step00000015-state"


def test_of_states_without_identity_the_farthest_of_these_options(tmp_path: Path) -> None:
    for name, step, dim in (("name-state", 40, "4"), ("name-000001-state", 10, "8")):
        options = {"--task": "t2v-14B", "--dit": "d", "--network_dim": dim}  # and the defaults of all others
        anonymous(save(tmp_path / name, step, options=options))

    def auto(*more: str) -> str:
        state = find_state(settings_of(tmp_path, "--resume", "auto", *more))
        assert state is not None
        return state.folder.name

    assert auto("--network_dim", "4") == "name-state"
    assert auto("--network_dim", "8") == "name-000001-state"
    assert auto("--network_dim", "16") == "name-state"  # refused with the difference
    save(tmp_path / "name-000002-state", 20)
    assert auto("--network_dim", "8") == "name-000002-state"


def test_states_of_a_later_version_are_refused_by_name(tmp_path: Path) -> None:
    anonymous(save(tmp_path / "name-state"), version="2")
    for word in (str(tmp_path / "name-state"), "auto"):
        with pytest.raises(InputError, match=r"name-state is a state of version 2, this trainer reads up to 1: update"):
            find_state(settings_of(tmp_path, "--resume", word))
    assert find_state(settings_of(tmp_path)) is None
    assert whole_states(saving(tmp_path)) == []  # it is not in the way of a fresh start


def test_a_folder_that_a_kill_left_aside_is_found_again(tmp_path: Path) -> None:
    save(tmp_path / "name-state", 40)
    hidden = tmp_path / ".name-state.elsewhere~1~x"
    for part in ("replacing", "replaced"):
        (hidden / part).mkdir(parents=True)
    shutil.copytree(tmp_path / "name-state", hidden / "replaced" / "name-state")
    (tmp_path / "name-state").rename(hidden / "replacing" / "name-state")
    os.utime(hidden, (0, 0))
    for word in (str(tmp_path / "name-state"), "auto"):
        found = find_state(settings_of(tmp_path, "--resume", word))
        assert found is not None and found.position.step == 40


def test_a_state_of_a_later_version_stops_only_who_looks_for_one_to_resume(tmp_path: Path) -> None:
    save(tmp_path / "name-000001-state", 10)
    later = save(tmp_path / "name-000002-state", 20) / "manifest.json"
    later.write_text(json.dumps(json.loads(later.read_text()) | {"version": "2"}))
    with pytest.raises(InputError, match="of version 2"):
        chosen(tmp_path)
    own = open_state(tmp_path / "name-000001-state")
    assert newest_of(saving(tmp_path), RUN.session) == own and identity_of(own, saving(tmp_path)).session == RUN.session
    warn_of_others(saving(tmp_path), Identity(2, 200.0), None)
