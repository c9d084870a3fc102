"""A local folder and its remote copy."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import wan_train.remote.uploads
from tests.filesystems import Flaky
from wan_train.remote.folder import open_remote
from wan_train.remote.mirror import Mirror
from wan_train.remote.uploads import Uploads, retried

Make = Callable[..., Mirror]


@pytest.fixture
def make(flaky: type[Flaky], tmp_path: Path) -> Make:
    """A mirror of `here` in `there`."""
    (tmp_path / "here").mkdir()

    def build(**options: object) -> Mirror:
        remote = open_remote(f"flaky://{tmp_path}/there", "--output_dir")
        return Mirror(tmp_path / "here", remote, **options)  # type: ignore[arg-type]

    return build


def held(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_files_are_copied_under_their_names_and_stay(make: Make, tmp_path: Path) -> None:
    mirror = make()
    for name in ("a.bin", "sample/b.bin"):
        path = mirror.local / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
        mirror.upload(path)
    mirror.finish()
    assert held(tmp_path / "there") == held(mirror.local) == {name: name for name in ("a.bin", "sample/b.bin")}
    assert not mirror.failed


def test_what_need_not_stay_is_removed_once_it_is_uploaded(make: Make, tmp_path: Path) -> None:
    mirror = make(keeps_local=False)
    (mirror.local / "images").mkdir()
    (mirror.local / "images" / "0.png").write_text("0")
    (mirror.local / "a.mp4").write_text("a")
    for name in ("images", "a.mp4"):
        mirror.upload(mirror.local / name)
    mirror.finish()
    assert held(tmp_path / "there") == {"a.mp4": "a", "images/0.png": "0"}
    assert list(mirror.local.iterdir()) == []


def test_an_upload_is_tried_three_times(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mirror = make()
    (mirror.local / "a.bin").write_text("whole")
    Flaky.failures = 2
    mirror.upload(mirror.local / "a.bin")
    mirror.finish()
    assert held(tmp_path / "there") == {"a.bin": "whole"}
    assert not mirror.failed and Flaky.tried == ["a.bin"] * 3
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_one_that_fails_every_time_is_told_of_once_and_the_others_go_on(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = make(keeps_local=False)
    for name in ("a.bin", "b.bin"):
        (mirror.local / name).write_text(name)
    Flaky.failures = 3
    for name in ("a.bin", "b.bin"):
        mirror.upload(mirror.local / name)
    mirror.finish()
    assert mirror.failed == [mirror.local / "a.bin"]
    assert held(mirror.local) == {"a.bin": "a.bin"} and held(tmp_path / "there") == {"b.bin": "b.bin"}
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told.startswith(f"{mirror.local / 'a.bin'} could not be uploaded to flaky://")
    assert told.endswith("after 3 attempts, the local copy is kept: the line is broken")


def test_what_is_gone_here_goes_there_too_after_its_own_upload(make: Make, tmp_path: Path) -> None:
    mirror = make(last=("manifest.json",))
    state = mirror.local / "a-state"
    state.mkdir()
    (state / "manifest.json").write_text("{}")
    (mirror.local / "a.bin").write_text("a")
    paths = [state, mirror.local / "a.bin"]
    for path in paths:
        mirror.upload(path)
    mirror.remove(paths)
    mirror.finish()
    assert Flaky.tried == ["manifest.json", "a.bin"] and held(tmp_path / "there") == {}


def test_growing_files_are_copied_as_they_are(make: Make, tmp_path: Path) -> None:
    here = tmp_path / "here"
    mirror = make(growing=(here / "a.jsonl", here / "logs"))
    (here / "a.jsonl").write_text("1\n")
    (here / "logs" / "run").mkdir(parents=True)
    (here / "logs" / "run" / "events").write_text("e")
    mirror.upload_growing()
    (here / "a.jsonl").write_text("1\n2\n")
    mirror.finish()
    assert held(tmp_path / "there") == {"a.jsonl": "1\n2\n", "logs/run/events": "e"}


def test_uploads_do_not_make_anyone_wait_and_keep_their_order() -> None:
    gate, done = threading.Event(), list[int]()
    uploads = Uploads(background=True)

    def upload(number: int) -> None:
        gate.wait(10)
        done.append(number)

    for number in range(3):
        uploads.add(partial(upload, number))
    assert done == []
    gate.set()
    uploads.finish()
    assert done == [0, 1, 2]


def test_pauses_grow_and_the_last_failure_is_raised() -> None:
    pauses, tries = list[float](), list[int]()

    def fail() -> None:
        tries.append(1)
        raise ConnectionError(f"try {len(tries)}")

    with pytest.raises(ConnectionError, match="try 3"):
        retried(fail, pause=pauses.append)
    assert tuple(pauses) == wan_train.remote.uploads.WAITS and pauses[0] < pauses[1]
