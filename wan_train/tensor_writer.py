"""Write safetensors files tensor by tensor, for models that do not fit into memory twice.

The format: eight bytes with the length of a JSON header, the header, then the bytes of the tensors (the specification
of safetensors). The header comes first, so shapes and dtypes must be known in advance.
"""

import json
import math
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wan_train.shards import INDEX, MARK, divide, files_of, shard_names
from wan_train.storage import DTYPE_NAMES, replacing, replacing_set

_ALIGNMENT = 8  # bytes, of the first tensor


@dataclass(frozen=True)
class Row:
    """Shape and dtype of a tensor in the header."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: str | Path, rows: Mapping[str, Row], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write the named tensors, each cast to its row's dtype, as they are yielded: in any order, each once.

    The file is written atomically. Raises InputError for a full disk, and ValueError for a tensor without a row or with
    a different shape, and for a missing one.
    """
    with replacing(path) as temporary:
        _fill(temporary, rows, tensors, metadata)


def write_set(
    path: Path, rows: Mapping[str, Row], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], limit: int | None
) -> list[Path]:
    """Write a checkpoint in shards of at most `limit` bytes of tensors, or in a single file; return the files, index
    last.

    Shards are written to a hidden folder, then moved into place one by one, the index last. Other files of an earlier
    checkpoint of that name are removed after that. Raises InputError for a full disk.
    """
    groups = divide({name: row.num_bytes for name, row in rows.items()}, limit)
    names = shard_names(path, len(groups))
    earlier = files_of(path) if path.parent.is_dir() else []
    if len(groups) == 1:
        write_tensors(path, rows, ((name, tensors[name]) for name in rows), metadata)
        written = [path]
    else:
        marked = {**metadata, MARK: uuid.uuid4().hex}
        with replacing_set(path) as folder:
            for shard, group in zip(names, groups, strict=True):
                own = {name: rows[name] for name in group}
                _fill(folder / shard, own, ((name, tensors[name]) for name in group), marked)
            index = path.name + INDEX
            (folder / index).write_text(_index(rows, dict(zip(names, groups, strict=True))), encoding="utf-8")
        written = [path.with_name(name) for name in (*names, index)]
    for file in sorted(earlier, key=lambda file: file.suffix != ".json"):  # the index first
        if file not in written:
            file.unlink(missing_ok=True)
    return written


def _fill(
    path: Path, rows: Mapping[str, Row], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write a file in place. Raises OSError for a full disk."""
    starts, header = _lay_out(rows, metadata)
    waiting = set(rows)
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            if name not in waiting or tuple(tensor.shape) != rows[name].shape:
                raise ValueError(f"{name} {tuple(tensor.shape)} does not match the header")
            waiting.remove(name)
            file.seek(len(header) + starts[name])
            data = tensor.detach().to("cpu", rows[name].dtype).contiguous()
            file.write(data.flatten().view(torch.uint8).numpy().data)
    if waiting:
        raise ValueError(f"{len(waiting)} tensors are missing: {', '.join(sorted(waiting)[:3])}")


def _index(rows: Mapping[str, Row], groups: Mapping[str, list[str]]) -> str:
    weight_map = {name: shard for shard, group in groups.items() for name in group}
    total = sum(row.num_bytes for row in rows.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)


def _lay_out(rows: Mapping[str, Row], metadata: Mapping[str, str]) -> tuple[dict[str, int], bytes]:
    """Return the offset of each tensor after the header, and the header's bytes."""
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, end = {}, 0
    # Widest dtypes first, so that every tensor is aligned to its item size.
    for name, row in sorted(rows.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        starts[name] = end
        end += row.num_bytes
        described[name] = {"dtype": DTYPE_NAMES[row.dtype], "shape": row.shape, "data_offsets": [starts[name], end]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return starts, len(text).to_bytes(8, "little") + text
