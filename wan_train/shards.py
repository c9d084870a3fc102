"""Checkpoints in several files: which files belong to one, and how a model is divided into them.

The names are those of Hugging Face: STEM-00001-of-00003.safetensors, and STEM.safetensors.index.json, which tells where
each tensor is.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from wan_train.errors import InputError

INDEX = ".index.json"
MARK = "wan_train_saving"  # in the metadata of each file of a set: the same for those of one saving
_SHARD = re.compile(r"^(.*?)(\d+)-of-(\d+)\.safetensors$")
_OF_SET = r"-\d{5}-of-\d{5}"  # as `shard_names` writes it


def expand(source: str | os.PathLike[str]) -> list[Path]:
    """The files behind a checkpoint path: itself, all of its set or its index, or those of a folder.

    InputError where one is missing, or where they are of two savings.
    """
    path = Path(source)
    # pathlib's own questions raise for a name that is too long (Python 3.11).
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
            f"{path}: {len(missing)} of {int(total)} shards are missing ({', '.join(missing[:3])}): download them too"
        )
    return _of_one_saving(paths)


def _in_folder(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob("*.safetensors" + INDEX))
    if len(indexes) > 1:
        names = ", ".join(index.name for index in indexes[:3])
        raise InputError(f"{folder} holds {len(indexes)} checkpoints: give the index of one, as {names}")
    if indexes:
        return _of_index(indexes[0])
    files = sorted(folder.glob("*.safetensors"))
    sets = {m[1] for f in files if (m := _SHARD.match(f.name))}
    if len(files) == 1 or (files and len(sets) == 1 and all(_SHARD.match(f.name) for f in files)):
        return expand(files[0])
    raise InputError(f"{folder} holds {len(files)} safetensors files and no index: name the one to load")


def _of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        # Only plain names: an index may not lead out of its folder.
        paths = [index.with_name(Path(name).name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index} is not an index of shards: download it again") from None
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise InputError(f"{index}: {len(missing)} files of its index are missing ({', '.join(missing[:3])})")
    return _of_one_saving(paths)


def _of_one_saving(paths: list[Path]) -> list[Path]:
    """The same paths. Sets of other programs have no mark."""
    marks = set()
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                marks.add((file.metadata() or {}).get(MARK))
        except (SafetensorError, OSError):
            return paths  # whoever reads it tells what is wrong with it
    if len(marks) > 1:
        raise InputError(
            f"{paths[0]} and the others of its set are of two savings, the second of which was cut off: take another"
            " checkpoint, or resume from a state and save again"
        )
    return paths


def divide(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """The names, in their order, in groups of at most `limit` bytes; one that is larger stands alone."""
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
    """What the files of a set are called; of one file its own name."""
    if count == 1:
        return [path.name]
    return [f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}" for number in range(1, count + 1)]


def names_of(stem: str, suffix: str) -> str:
    """A regular expression for the names of all files of a checkpoint; `stem` is one for its stem."""
    return rf"{stem}(?:{_OF_SET})?{re.escape(suffix)}(?:{re.escape(INDEX)})?"


def files_of(path: Path) -> list[Path]:
    """What is there of the checkpoint that is called `path`: one file, or the shards and then their index."""
    pattern = re.compile(re.escape(path.stem) + _OF_SET + re.escape(path.suffix))
    shards = sorted(found for found in path.parent.iterdir() if pattern.fullmatch(found.name))
    others = [path, path.with_name(path.name + INDEX)]
    return [*shards, *(found for found in others if found.is_file())]


def entry_of(path: Path) -> Path:
    """What to give as `--dit` for the checkpoint that is called `path`: that file, or the index of its set."""
    index = path.with_name(path.name + INDEX)
    return index if index.is_file() else path
