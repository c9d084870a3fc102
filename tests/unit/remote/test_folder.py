"""Remote folders: whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.filesystems import Flaky
from wan_train.errors import InputError
from wan_train.remote.addresses import is_remote, local_folder, shown, split
from wan_train.remote.folder import RemoteFolder, open_remote

MANIFEST = "manifest.json"
# Uploads a folder whose second file never comes to its end, and says when it is at it.
STUCK = """
import sys, time
from pathlib import Path
from fsspec.implementations.local import LocalFileSystem
from wan_train.remote.folder import open_remote
put = LocalFileSystem.put_file
def slow(self, lpath, rpath, **more):
    if lpath.endswith("b.bin"):
        Path(rpath).write_bytes(b"half")
        print("in the middle", flush=True)
        time.sleep(60)
    put(self, lpath, rpath, **more)
LocalFileSystem.put_file = slow
open_remote(sys.argv[1], "--output_dir").put(Path(sys.argv[2]), sys.argv[3])
"""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "here" / "name-state"
    folder.mkdir(parents=True)
    for name in ("a.bin", "b.bin", MANIFEST):
        (folder / name).write_text(f"new {name}")
    return folder


def held(folder: RemoteFolder, name: str) -> dict[str, str]:
    return {each: (folder.read(f"{name}/{each}") or b"").decode() for each in folder.names(name)}


@pytest.mark.parametrize("url", ["gs://bucket/x", "s3://b", "memory://x", "file:///x", "S3://b/{seed}.mp4"])
def test_urls_are_remote(url: str) -> None:
    assert is_remote(url)


@pytest.mark.parametrize("path", ["", "out", "/abs/out", "C:\\out", "C:/out", "./a:b", "out//x"])
def test_paths_are_local(path: str) -> None:
    assert not is_remote(path)


def test_addresses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one, other = local_folder("gs://bucket/a/b"), local_folder("gs://bucket/a_b")
    assert one.parent == tmp_path / "wan-train" / "remote" and one != other
    assert one == local_folder("gs://bucket/a/b/")
    assert local_folder("gs://bucket/a", "mine") == Path("mine")
    assert split("gs://bucket/a/x-state/") == ("gs://bucket/a", "x-state")
    assert shown("sftp://me:secret@host/a") == "sftp://me:***@host/a"


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_what_is_put_is_there_and_can_be_fetched(
    protocol: str, memory: MemoryFileSystem, tmp_path: Path, state: Path
) -> None:
    folder = open_remote(f"{protocol}://{tmp_path}/there/deep", "--output_dir")
    folder.check_writable("--output_dir")
    assert folder.names() == []
    folder.put(state / "a.bin", "sample/a.bin")
    folder.put(state, "name-state", last=(MANIFEST,))
    assert folder.read("sample/a.bin") == b"new a.bin" and folder.read("absent") is None
    assert folder.sizes("sample") == {"a.bin": 9}
    assert folder.names() == ["name-state", "sample"]
    folder.fetch_folder("name-state", tmp_path / "back")
    assert {path.name: path.read_text() for path in (tmp_path / "back").iterdir()} == held(folder, "name-state")
    folder.fetch("sample/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == b"new a.bin"
    for name in ("name-state", "sample/a.bin", "absent"):
        folder.remove(name, last=(MANIFEST,))
    assert folder.names("name-state") == [] and folder.read("sample/a.bin") is None


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_a_folder_gives_way_to_a_new_one(protocol: str, memory: MemoryFileSystem, tmp_path: Path, state: Path) -> None:
    folder = open_remote(f"{protocol}://{tmp_path}/there", "--output_dir")
    old = tmp_path / "old"
    old.mkdir()
    for name in ("a.bin", "stale.bin", MANIFEST):
        (old / name).write_text("old")
    folder.put(old, "name-state", last=(MANIFEST,))
    folder.put(state, "name-state", last=(MANIFEST,))
    assert held(folder, "name-state") == {name: f"new {name}" for name in ("a.bin", "b.bin", MANIFEST)}
    assert folder.names() == ["name-state"]


def test_objects_of_a_folder_are_put_with_the_last_one_last(
    memory: MemoryFileSystem, tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is renamed, an upload that is broken off leaves a folder without its manifest."""
    folder = open_remote("memory://there", "--output_dir")
    folder.put(state, "name-state", last=(MANIFEST,))
    put = MemoryFileSystem.put_file

    def breaking(self: MemoryFileSystem, lpath: str, rpath: str, **more: Any) -> None:
        if lpath.endswith("b.bin"):
            raise ConnectionError
        put(self, lpath, rpath, **more)

    monkeypatch.setattr(MemoryFileSystem, "put_file", breaking)
    with pytest.raises(ConnectionError):
        folder.put(state, "name-state", last=(MANIFEST,))
    assert folder.names("name-state") == ["a.bin", "b.bin"]


def test_a_broken_upload_leaves_what_was_there(flaky: type[Flaky], tmp_path: Path, state: Path) -> None:
    folder = open_remote(f"flaky://{tmp_path}/there", "--output_dir")
    folder.put(state / "a.bin", "kept")
    Flaky.failures = 1
    with pytest.raises(ConnectionError):
        folder.put(state / "b.bin", "kept")
    assert folder.read("kept") == b"new a.bin"
    assert os.listdir(tmp_path / "there") == ["kept"]


def test_a_process_killed_in_an_upload_leaves_nothing_under_the_name(root: Path, tmp_path: Path, state: Path) -> None:
    there = tmp_path / "there"
    for path, name in ((state, "name-state"), (state / "b.bin", "b.bin")):
        command = [sys.executable, "-c", STUCK, there.as_uri(), str(path), name]
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "in the middle\n"
            process.send_signal(signal.SIGKILL)
        assert [each for each in os.listdir(there) if not each.startswith(".")] == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"--output_dir s3://bucket/x needs the package s3fs: pip install s3fs, or "):
        open_remote("s3://bucket/x", "--output_dir")


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"--save_path nope://x cannot be opened \(fsspec does not know nope://\): give a"
    ):
        open_remote("nope://x", "--save_path")


def test_a_folder_that_cannot_be_written_to_is_refused(flaky: type[Flaky], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"flaky://\S+ cannot be written to \(\w+: .*\): check the bucket"):
        open_remote(f"flaky://{tmp_path}/file/below", "--output_dir").check_writable("--output_dir")
