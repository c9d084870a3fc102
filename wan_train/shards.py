"""Sharded checkpoints: which files belong together, and how a model is divided into files.

The names are those of Hugging Face: STEM-00001-of-00003.safetensors, and STEM.safetensors.index.json, which maps
tensors to files.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from wan_train.errors import InputError

INDEX = ".index.json"
MARK = "wan_train_saving"  # metadata key with the same value in all shards that were saved together
_SHARD = re.compile(r"^(.*?)(\d+)-of-(\d+)\.safetensors$")
_OF_SET = r"-\d{5}-of-\d{5}"  # as written by `shard_names`


def expand(source: str | os.PathLike[str]) -> list[Path]:
    """Return the files of a checkpoint: the file itself, all shards for a shard or index, or those of a folder.

    Raises InputError if one is missing, or if shards were not saved together.
    """
    path = Path(source)
    # pathlib's methods raise for a name that is too long (Python 3.11).
    if os.path.isdir(path):
        return _in_folder(path)
    if not os.path.isfile(path):
        raise InputError(f"no such file: {path}")
    if path.name.endswith(INDEX):
        return _of_index(path)
    shard = _SHARD.match(path.name)
    if not shard:
        return [path]
    stem, width, total = shard[1], len(shard[2]), shard[3]
    paths = [path.with_name(f"{stem}{i:0{width}d}-of-{total}.safetensors") for i in range(1, int(total) + 1)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {int(total)} shards are missing ({', '.join(missing[:3])}): download them"
        )
    return _of_one_saving(paths)


def _in_folder(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob("*.safetensors" + INDEX))
    if len(indexes) > 1:
        names = ", ".join(index.name for index in indexes[:3])
        raise InputError(f"{folder} has {len(indexes)} checkpoints: give the index of one, such as {names}")
    if indexes:
        return _of_index(indexes[0])
    files = sorted(folder.glob("*.safetensors"))
    sets = {m[1] for f in files if (m := _SHARD.match(f.name))}
    if len(files) == 1 or (files and len(sets) == 1 and all(_SHARD.match(f.name) for f in files)):
        return expand(files[0])
    raise InputError(f"{folder} has {len(files)} safetensors files and no index: give the file to load")


def _of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        # Only base names: an index must not refer to files outside its folder.
        paths = [index.with_name(Path(name).name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index} is not a valid index of shards: download it again") from None
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise InputError(f"{index}: {len(missing)} files listed in it are missing ({', '.join(missing[:3])})")
    return _of_one_saving(paths)


def _of_one_saving(paths: list[Path]) -> list[Path]:
    """Return the same paths if they were saved together; shards of other programs have no mark."""
    marks = set()
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                marks.add((file.metadata() or {}).get(MARK))
        except (SafetensorError, OSError):
            return paths  # reported when the file is read
    if len(marks) > 1:
        raise InputError(
            f"{paths[0]} and the other shards were not saved together, saving was interrupted: use another"
            " checkpoint, or resume from a state and save again"
        )
    return paths


def divide(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Divide the names, in order, into groups of at most `limit` bytes; a larger tensor gets a group of its own."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and limit is not None and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def shard_names(path: Path, count: int) -> list[str]:
    """Return the file names of a checkpoint with `count` files; of a single file its own name."""
    if count == 1:
        return [path.name]
    return [f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}" for number in range(1, count + 1)]


def names_of(stem: str, suffix: str) -> str:
    """Return a regular expression for the names of all files of a checkpoint; `stem` is one for its stem."""
    return rf"{stem}(?:{_OF_SET})?{re.escape(suffix)}(?:{re.escape(INDEX)})?"


def files_of(path: Path) -> list[Path]:
    """Return the existing files of the checkpoint `path`: a single file, or the shards and then their index."""
    pattern = re.compile(re.escape(path.stem) + _OF_SET + re.escape(path.suffix))
    shards = sorted(found for found in path.parent.iterdir() if pattern.fullmatch(found.name))
    others = [path, path.with_name(path.name + INDEX)]
    return [*shards, *(found for found in others if found.is_file())]


def entry_of(path: Path) -> Path:
    """Return the path to give as `--dit` for the checkpoint `path`: that file, or the index of its shards."""
    index = path.with_name(path.name + INDEX)
    return index if index.is_file() else path
