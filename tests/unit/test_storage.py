import os
import pickle
import resource
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan_train import flushing
from wan_train.errors import InputError
from wan_train.shards import expand
from wan_train.storage import (
    check_writable,
    read_header,
    read_parts,
    read_tensors,
    replacing,
    replacing_folder,
    replacing_set,
    save_parts,
    save_tensors,
)


def tensors() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


@pytest.mark.parametrize("wrap", [None, "state_dict", "module", "model_state"])
def test_pth_and_safetensors_read_alike(tmp_path: Path, wrap: str | None) -> None:
    save_file(tensors(), tmp_path / "x.safetensors")
    torch.save({wrap: tensors()} if wrap else tensors(), tmp_path / "x.pth")
    for name in ("x.safetensors", "x.pth"):
        header = read_header(tmp_path / name)
        assert header.shapes == {"a.weight": (2, 3), "b": (2,)}
        assert header.dtypes == {"a.weight": torch.float32, "b": torch.bfloat16}
        read = dict(read_tensors(tmp_path / name))
        assert all(torch.equal(read[key], value) for key, value in tensors().items())


def test_the_old_pth_format_is_read(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(dict(read_tensors(tmp_path / "x.pth"))["a.weight"], tensors()["a.weight"])


def test_any_shard_names_its_whole_set(tmp_path: Path) -> None:
    for index in (1, 2):
        save_file({f"w{index}": torch.ones(index)}, tmp_path / f"m-0000{index}-of-00002.safetensors")
    for source in (tmp_path / "m-00002-of-00002.safetensors", tmp_path):
        assert set(read_header(source).shapes) == {"w1", "w2"}
    (tmp_path / "m-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="m-00001-of-00002"):
        expand(tmp_path / "m-00002-of-00002.safetensors")


def test_a_folder_of_unrelated_files_is_ambiguous(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match="give the file to load"):
        expand(tmp_path)


def test_truncated_and_foreign_files_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "x.safetensors"
    save_file(tensors(), whole)
    short = tmp_path / "short.safetensors"
    short.write_bytes(whole.read_bytes()[:-3])
    torch.save(tensors(), tmp_path / "x.pth")
    short_pth = tmp_path / "short.pth"
    short_pth.write_bytes((tmp_path / "x.pth").read_bytes()[:-400])
    text = tmp_path / "text.pth"
    text.write_text("hello")
    unnamed = tmp_path / "unnamed.pth"
    torch.save({(3, 4): torch.ones(1)}, unnamed)
    for bad in (short, short_pth, text, unnamed, tmp_path / "absent.safetensors"):
        with pytest.raises(InputError, match=bad.name):
            read_header(bad)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code ran",))


def test_a_pickle_with_code_is_refused_unrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.ones(1), "x": Payload()}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"x": Payload()}))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(InputError, match=name):
            read_header(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors(), {"k": "v"})
    assert read_header(path).metadata == {"k": "v"}
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert torch.equal(load_file(path)["a.weight"], tensors()["a.weight"])
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        check_writable(tmp_path / "file" / "folder")
    with pytest.raises(InputError, match=r"x\.safetensors"):
        save_tensors(tmp_path / "file" / "x.safetensors", tensors())


@pytest.mark.parametrize("folder", ["gs://bucket/folder", Path("s3://bucket/folder")])
def test_a_url_is_not_taken_for_a_local_folder(
    folder: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="only --save_path and --output_dir take URLs"):
        check_writable(folder)
    assert not list(tmp_path.iterdir())


def test_parts_that_find_no_room_say_what_the_disk_said(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_parts(tmp_path / "run.pt", {"state": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_saved_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "x.safetensors", tensors())
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_view_is_saved_without_what_it_is_a_view_of(tmp_path: Path) -> None:
    whole = torch.arange(100_000.0)
    parts = {
        "part": whole[10:20],
        "turned": whole[:6].view(2, 3).t(),
        "twice": [whole, whole],
        "one": whole[:1].expand(5),
    }
    save_parts(tmp_path / "run.pt", parts)
    assert (tmp_path / "run.pt").stat().st_size < 4 * len(whole) + 8192
    saved = read_parts(tmp_path / "run.pt")
    for name in ("part", "turned", "one"):
        assert torch.equal(saved[name], parts[name])  # type: ignore[arg-type]
    assert all(torch.equal(again, whole) for again in saved["twice"])
    save_parts(tmp_path / "run.pt", {"part": parts["part"]})
    assert (tmp_path / "run.pt").stat().st_size < 4096


def test_windows_flushes_files_that_may_be_written_to_and_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: dict[int, int] = {}
    flushed: list[int] = []

    def open_there(path: Path, mode: int, *more: int, **options: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        descriptor = os.open(path, mode, *more, **options)
        modes[descriptor] = mode & os.O_ACCMODE
        return descriptor

    def flush_there(descriptor: int) -> None:
        if modes[descriptor] == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        flushed.append(descriptor)
        os.fsync(descriptor)

    windows = ModuleType("os")
    windows.__dict__.update(vars(os), name="nt", open=open_there, fsync=flush_there)
    monkeypatch.setattr(flushing, "os", windows)
    save_tensors(tmp_path / "x.safetensors", tensors())
    for replaces in (replacing_folder, replacing_set):
        with replaces(tmp_path / "state") as folder:
            (folder / "part.json").write_text("{}")
    assert len(flushed) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors", "state", "part.json"}
    assert (tmp_path / "state" / "part.json").read_text() == "{}"
