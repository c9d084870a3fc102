"""Which state `--resume` takes where the output folder is remote."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from wan_train.errors import InputError
from wan_train.remote.folder import open_remote
from wan_train.training.saving.remote_output import fetch_named_state, fetching, remote_states, with_remote
from wan_train.training.saving.settings import SaveSettings
from wan_train.training.saving.state import State, open_state

Make = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> SaveSettings:
    return SaveSettings(output_dir=str(tmp_path / "here"), output_name="x")


def write_state(folder: Path, step: int, *, version: int = 1, session: int = 1, started_at: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.pt").write_bytes(b"state")
    position = {"step": step, "epoch": 1, "epoch_step": step}
    run = {"session": session, "started_at": started_at}
    rows = {"version": version, "run": run, "position": position, "seed": 1, "configuration": {}}
    (folder / "manifest.json").write_text(json.dumps(rows | {"sizes": {"run.pt": 5}}))
    return folder


def test_whole_states_of_the_name_are_found(memory: MemoryFileSystem, save: SaveSettings, tmp_path: Path) -> None:
    remote = open_remote("memory://runs", "--output_dir")
    for name in ("x-step00000002-state", "x-step00000004-state", "y-state", "x-state"):
        remote.put(write_state(tmp_path / name, 2 if name.endswith("2-state") else 4), name)
    memory.rm_file("/runs/x-state/run.pt")
    memory.rm_file("/runs/x-step00000004-state/manifest.json")
    (found,) = remote_states(save, remote)
    assert (found.folder, found.position.step) == (Path(save.output_dir) / "x-step00000002-state", 2)


def test_a_connection_that_fails_is_not_taken_for_no_states(
    memory: MemoryFileSystem, save: SaveSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = open_remote("memory://runs", "--output_dir")
    remote.put(write_state(tmp_path / "x-state", 2), "x-state")
    ls = MemoryFileSystem.ls

    def failing(self: MemoryFileSystem, path: str, detail: bool = True, **more: object) -> object:
        if path.endswith("x-state"):
            raise ConnectionError("no network")
        return ls(self, path, detail=detail, **more)

    monkeypatch.setattr(MemoryFileSystem, "ls", failing)
    with pytest.raises(InputError, match=r"memory://runs cannot be read \(ConnectionError: no network\)"):
        with fetching(remote, Path(save.output_dir)):
            remote_states(save, remote)


@pytest.mark.parametrize(
    ("here", "there", "taken"),
    [((4, 1.0), (2, 1.0), "here"), ((2, 1.0), (4, 1.0), "there"), ((4, 1.0), (2, 2.0), "there")],
)
def test_of_two_states_of_a_name_the_later_is_taken(
    here: tuple[int, float], there: tuple[int, float], taken: str, tmp_path: Path
) -> None:
    states: dict[str, State] = {}
    for place, (step, started_at) in (("here", here), ("there", there)):
        states[place] = open_state(write_state(tmp_path / place / "x-state", step, started_at=started_at))
    assert with_remote([states["here"]], [states["there"]]) == [states[taken]]
    assert with_remote([], [states["there"]]) == [states["there"]]


def test_a_named_state_is_downloaded_once_and_again_when_it_changes(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote = open_remote("memory://runs", "--output_dir")
    remote.put(write_state(tmp_path / "one" / "x-state", 2), "x-state")
    folder = fetch_named_state("memory://runs/x-state/")
    assert open_state(folder).position.step == 2
    kept = (folder / "run.pt").stat()
    assert (fetch_named_state("memory://runs/x-state") / "run.pt").stat() == kept
    remote.put(write_state(tmp_path / "two" / "x-state", 4), "x-state")
    assert open_state(fetch_named_state("memory://runs/x-state")).position.step == 4
    with pytest.raises(InputError, match=r"--resume memory://runs/y-state has no manifest\.json"):
        fetch_named_state("memory://runs/y-state")
    remote.put(write_state(tmp_path / "three" / "x-state", 6, version=99), "x-state")
    with pytest.raises(InputError, match="version 99"):
        fetch_named_state("memory://runs/x-state")
