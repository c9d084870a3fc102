"""Folders that are replaced while the process is killed: nothing is lost, and the next start puts things in place."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dataset.caching.remains import put_back, remove_remains
from tests.unit.killing import killed_at
from wan_train import storage
from wan_train.errors import InputError
from wan_train.storage import replacing_folder


def write(folder: Path, text: str) -> None:
    with replacing_folder(folder) as temporary:
        for name in ("a", "b"):
            (temporary / name).write_text(text)


def read(folder: Path) -> set[str]:
    assert {file.name for file in folder.iterdir()} == {"a", "b"}
    return {file.read_text() for file in folder.iterdir()}


def finishes(moment: int, folder: Path) -> bool:
    """Replace a folder in a process that is killed before its `moment`th change of the file system."""
    changes = ((os, "replace"), (shutil, "rmtree"), (Path, "mkdir"))
    return killed_at(moment, changes, lambda: write(folder, "new"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["name-state", "v1.2-state"])
def test_killed_at_any_moment_a_folder_is_the_old_or_the_new_one(tmp_path: Path, before: bool, name: str) -> None:
    for moment in range(20):
        parent = tmp_path / str(moment)
        folder = parent / name
        parent.mkdir()
        if before:
            write(folder, "old")
        finished = finishes(moment, folder)
        remove_remains(parent)
        assert [path.name for path in parent.iterdir()] in ([name], [] if not before else [name])
        if before or folder.exists():
            assert read(folder) in ({"old"}, {"new"})
        if finished:
            break
    assert finished and moment >= 3 and read(folder) == {"new"}


def test_what_cannot_take_its_place_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, replace = tmp_path / "name-state", os.replace
    write(folder, "old")

    def refused(source: Path, target: Path) -> None:
        if source.parent.name == storage.NEW:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", refused)
    with pytest.raises(InputError, match=r"cannot write .*Input/output error"):
        write(folder, "new")
    assert read(folder) == {"old"} and list(tmp_path.iterdir()) == [folder]


def test_what_cannot_be_moved_back_either_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where a scanner holds a file that has just been written."""
    folder, replace = tmp_path / "state", os.replace
    write(folder, "old")

    def refused(source: Path, target: Path) -> None:
        if target == folder:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "replace", refused)
        with pytest.raises(InputError, match="Permission denied"):
            write(folder, "new")
    assert not folder.exists()
    (hidden,) = tmp_path.iterdir()
    os.utime(hidden, (0, 0))  # this process lives still
    assert put_back(tmp_path) == [folder] and read(folder) == {"new"}


def test_another_machines_replacing_is_finished_once_it_rests(tmp_path: Path) -> None:
    hidden = tmp_path / ".name-state.elsewhere~1~x"
    for part, text in ((storage.NEW, "new"), (storage.OLD, "old")):
        (hidden / part / "name-state").mkdir(parents=True)
        for name in ("a", "b"):
            (hidden / part / "name-state" / name).write_text(text)
    assert put_back(tmp_path) == []
    os.utime(hidden, (0, 0))
    assert put_back(tmp_path) == [tmp_path / "name-state"] and read(tmp_path / "name-state") == {"new"}


def test_a_folder_that_another_user_replaces_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden folders are for their owner alone, so that others may not look into them."""
    theirs = tmp_path / ".state.elsewhere~1~abcdefgh"
    theirs.mkdir()
    write(tmp_path / "ours", "x")
    looked = os.stat

    def refused(path: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(path, (str, Path)) and theirs in Path(path).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return looked(path, *arguments, **named)

    monkeypatch.setattr(os, "stat", refused)
    assert put_back(tmp_path) == [] and remove_remains(tmp_path) == []
    assert read(tmp_path / "ours") == {"x"}
