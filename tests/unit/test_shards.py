"""Checkpoints in several files: division, names, what belongs together, and kills in the middle of a saving."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dataset.caching.remains import remove_remains
from tests.unit.killing import killed_at
from wan_train.errors import InputError
from wan_train.shards import divide, entry_of, expand, files_of
from wan_train.storage import read_header, read_tensors
from wan_train.tensor_writer import Row, write_set
from wan_train.training.saving.settings import SaveSettings


def tensors_of(value: float) -> dict[str, Tensor]:
    return {f"blocks.{i}.weight": torch.full((100,), value + i) for i in range(5)} | {"head": torch.full((3,), value)}


def save(path: Path, value: float, limit: int | None) -> list[Path]:
    tensors = tensors_of(value)
    rows = {name: Row(tuple(tensor.shape), torch.float32) for name, tensor in tensors.items()}
    return write_set(path, rows, tensors, {"format": "pt", "value": str(value)}, limit)


def values(source: Path) -> set[float]:
    """Which savings the tensors of a checkpoint are of."""
    assert {*read_header(source).shapes} == {*tensors_of(0)}
    shifts = {name: int(name.split(".")[1]) if "blocks" in name else 0 for name in tensors_of(0)}
    return {float(tensor[0]) - shifts[name] for name, tensor in read_tensors(source)}


@pytest.mark.parametrize(
    ("limit", "groups"),
    [(None, ["abcd"]), (100, ["abcd"]), (30, ["ab", "c", "d"]), (35, ["ab", "c", "d"]), (1, ["a", "b", "c", "d"])],
)
def test_groups_are_full_in_their_order_and_what_is_too_large_stands_alone(
    limit: int | None, groups: list[str]
) -> None:
    assert ["".join(group) for group in divide({"a": 10, "b": 20, "c": 30, "d": 40}, limit)] == groups


def test_a_set_is_found_by_its_index_any_shard_or_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "name.safetensors"
    written = save(path, 1, 1000)
    assert [file.name for file in written] == [
        *(f"name-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "name.safetensors.index.json",
    ]
    index = json.loads(written[-1].read_text())
    assert index["metadata"]["total_size"] == 4 * 503
    assert {name: set(load_file(tmp_path / shard)) for name, shard in index["weight_map"].items()}.keys() == {
        *tensors_of(0)
    }
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / shard)
    assert entry_of(path) == written[-1]
    for source in (tmp_path, written[-1], written[0], written[2]):
        assert expand(source) == written[:3]
        assert values(source) == {1}
    assert read_header(tmp_path).metadata["value"] == "1"


@pytest.mark.parametrize(("first", "second"), [(None, 1000), (1000, None), (1000, 500), (500, 1000), (1000, 1000)])
def test_saved_again_nothing_of_the_earlier_one_is_left(tmp_path: Path, first: int | None, second: int | None) -> None:
    path = tmp_path / "name.safetensors"
    save(tmp_path / "name-two.safetensors", 5, 1000)
    save(path, 1, first)
    written = save(path, 2, second)
    assert sorted(files_of(path)) == sorted(written)
    assert values(entry_of(path)) == {2}
    assert values(entry_of(tmp_path / "name-two.safetensors")) == {5}  # another's


def test_several_sets_of_a_folder_have_to_be_named(tmp_path: Path) -> None:
    save(tmp_path / "one.safetensors", 1, 1000)
    save(tmp_path / "two.safetensors", 2, 1000)
    with pytest.raises(InputError, match="has 2 checkpoints"):
        expand(tmp_path)
    assert values(tmp_path / "two.safetensors.index.json") == {2}
    assert values(tmp_path / "one-00002-of-00003.safetensors") == {1}


def test_an_index_that_is_none_and_files_that_are_not_there(tmp_path: Path) -> None:
    index = tmp_path / "name.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(InputError, match="not a valid index of shards"):
        expand(index)
    save(tmp_path / "name.safetensors", 1, 1000)
    (tmp_path / "name-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match="1 files listed in it are missing"):
        expand(index)
    with pytest.raises(InputError, match="1 of 3 shards are missing"):
        expand(tmp_path / "name-00001-of-00003.safetensors")


@pytest.mark.parametrize("name", ["n" * 300, "n" * 300 + ".safetensors", "d/" * 3000 + "n.pth"])
def test_a_name_that_no_file_can_have_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match="no such file: "):
        expand(name)


def test_sets_of_other_programs_have_no_mark(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({f"x{number}": torch.ones(2)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    assert len(expand(tmp_path)) == 2


def test_without_room_the_earlier_set_stays_and_the_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "name.safetensors"
    written = save(path, 1, 1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        with pytest.raises(InputError) as refused:
            save(path, 2, 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(refused.value) == f"cannot write {path}: File too large"
    assert sorted(tmp_path.iterdir()) == sorted(written) and values(tmp_path) == {1}


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("500MB", 500_000_000), ("1.5 gb", 1_500_000_000), ("5GiB", 5 << 30), ("2K", 2000)],
)
def test_sizes(text: str, size: int) -> None:
    assert SaveSettings(output_dir="out", output_name="name", max_shard_size=text).shard_bytes == size


@pytest.mark.parametrize("text", ["", "big", "0GB", "1e3", "-1GB", "5PB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="is not a size: give one like 10GB"):
        SaveSettings(output_dir="out", output_name="name", max_shard_size=text)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("before", [None, 1000, 500, "one file"], ids=str)
def test_killed_at_any_moment_a_checkpoint_is_the_old_or_the_new_one_or_refused(
    tmp_path: Path, before: int | str | None
) -> None:
    whole = 0
    for moment in range(30):
        folder = tmp_path / str(moment)
        path = folder / "name.safetensors"
        folder.mkdir()
        if before is not None:
            save(path, 1, before if isinstance(before, int) else None)
        finished = finishes(moment, path)
        seen = []
        for file in files_of(path):
            if file.suffix == ".json" or "-of-" not in file.name or not entry_of(path).name.endswith(".json"):
                try:
                    found = values(file)
                except InputError as problem:
                    assert "\n" not in str(problem)
                else:
                    assert len(found) == 1, "a mixture passed for a checkpoint"
                    seen += found
        assert finished <= (2 in seen)
        remove_remains(folder)
        assert not [file for file in folder.iterdir() if file.name.startswith(".")]
        assert save(path, 3, 1000) and values(entry_of(path)) == {3}
        whole += bool(seen)
        if finished:
            break
    assert finished and moment >= 4
    assert before is None or whole > moment / 2


def finishes(moment: int, path: Path) -> bool:
    """Save in shards in a process that is killed before its `moment`th change of the file system."""
    return killed_at(moment, ((os, "replace"), (Path, "unlink")), lambda: save(path, 2, 1000))
