import multiprocessing
import os
import sqlite3

import pytest

from dataset.caching.manifest import MANIFEST, Manifest


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "media" / "a.mp4"
    path.parent.mkdir()
    path.write_bytes(b"12345")
    return path


def learn_size(manifest, path, calls):
    return manifest.recall("size", path, lambda file: calls.append(file) or file.stat().st_size)


def test_a_fact_is_learnt_once_while_the_file_stays_the_same(tmp_path, source):
    calls = []
    for _ in range(3):
        with Manifest(tmp_path / "cache") as manifest:
            assert learn_size(manifest, source, calls) == 5
    assert len(calls) == 1
    os.utime(source, ns=(1, 1))
    with Manifest(tmp_path / "cache") as manifest:
        learn_size(manifest, source, calls)
    source.write_bytes(b"123456")
    os.utime(source, ns=(1, 1))
    with Manifest(tmp_path / "cache") as manifest:
        assert learn_size(manifest, source, calls) == 6
    assert len(calls) == 3


def test_facts_of_caches_move_with_their_folder(tmp_path, source):
    calls = []
    with Manifest(source.parent) as manifest:
        learn_size(manifest, source, calls)
    moved = source.parent.rename(tmp_path / "elsewhere")
    with Manifest(moved) as manifest:
        learn_size(manifest, moved / source.name, calls)
    assert len(calls) == 1


@pytest.mark.parametrize("damage", ["missing", "empty", "noise", "cut", "version", "other table"])
def test_a_broken_manifest_is_made_anew(tmp_path, source, damage):
    calls, path = [], tmp_path / "cache" / MANIFEST
    with Manifest(path.parent) as manifest:
        learn_size(manifest, source, calls)
        for number in range(200):
            manifest.note(f"more {number}", source, "x" * 100)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage in ("version", "other table"):
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version = 99" if damage == "version" else "DROP TABLE facts")
        database.close()
    else:
        path.write_bytes({"empty": b"", "noise": os.urandom(5000), "cut": whole[: len(whole) // 2]}[damage])
    for expected in (2, 2):
        with Manifest(path.parent) as manifest:
            assert learn_size(manifest, source, calls) == 5
        assert len(calls) == expected


def test_what_is_noted_holds_until_the_file_changes(tmp_path, source):
    with Manifest(tmp_path) as manifest:
        assert manifest.noted("broken", source) is None
        manifest.note("broken", source, "why")
    assert Manifest(tmp_path).noted("broken", source) == "why"
    source.write_bytes(b"repaired")
    assert Manifest(tmp_path).noted("broken", source) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, source):
    (tmp_path / "file").write_text("")
    with Manifest(tmp_path / "file" / "cache") as manifest:
        assert learn_size(manifest, source, []) == 5
    assert (tmp_path / "file").is_file()


def test_the_manifest_is_all_that_can_be_seen(tmp_path, source):
    with Manifest(tmp_path / "cache") as manifest:
        learn_size(manifest, source, [])
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")] == [MANIFEST]


def note_many(folder, source, worker):
    for number in range(5):
        with Manifest(folder) as manifest:
            manifest.note(f"{worker} {number}", source, number)


def test_processes_at_once_lose_nothing(tmp_path, source):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=note_many, args=(tmp_path / "cache", source, worker)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    manifest = Manifest(tmp_path / "cache")
    assert all(manifest.noted(f"{worker} {number}", source) == number for worker in range(4) for number in range(5))


def test_caches_that_are_gone_are_forgotten_and_sources_are_not(tmp_path, source):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / name).write_text(name)
    with Manifest(folder) as manifest:
        for path in (folder / "one", folder / "two", source):
            manifest.note("fact", path, path.name)
    (folder / "one").unlink()
    with Manifest(folder) as manifest:
        manifest.note("other", folder / "two", 1)
    with sqlite3.connect(folder / MANIFEST) as database:
        names = {name for (name,) in database.execute("SELECT name FROM facts WHERE kind = 'fact'")}
    database.close()
    assert names == {"two", str(source)}


def test_names_that_are_no_text_can_be_remembered(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    path.write_bytes(b"12345")
    with Manifest(tmp_path / "cache") as manifest:
        manifest.note("fact", path, 1)
    assert Manifest(tmp_path / "cache").noted("fact", path) == 1
