"""Read and write tensors on disk: lazily, safely and atomically.

Reading never unpickles code and never holds a file's tensors twice; files are written to a hidden folder next to the
target and renamed, so that a reader sees the old file or the complete new one.
"""

import contextlib
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wan_train.errors import InputError
from wan_train.file_names import PROBE, hidden_prefix
from wan_train.flushing import flush
from wan_train.remote.addresses import check_local
from wan_train.shards import expand

TensorSource = str | os.PathLike[str] | Mapping[str, Tensor]

NEW, OLD = "replacing", "replaced"  # subfolders of the hidden folder of `replacing_folder`: the new and the old folder

_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "module", "model_state")  # keys of single-key dictionaries around a state dict


@dataclass(frozen=True)
class Header:
    """Names, shapes, dtypes and metadata of a checkpoint, known before any tensor is read."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(source: TensorSource) -> Header:
    """Return names, shapes, dtypes and metadata of a checkpoint (a file, a shard, a folder or a state dict).

    Raises InputError for a file that is missing, truncated, corrupt or contains anything but tensors.
    """
    if isinstance(source, Mapping):
        return Header({k: tuple(v.shape) for k, v in source.items()}, {k: v.dtype for k, v in source.items()})
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    metadata: dict[str, str] = {}
    for path in expand(source):
        if path.suffix in _PICKLES:
            state = _open_pickle(path)
            shapes |= {k: tuple(v.shape) for k, v in state.items()}
            dtypes |= {k: v.dtype for k, v in state.items()}
            continue
        with _opened(path) as file:
            metadata |= file.metadata() or {}
            for key in list(file.keys()):
                piece = file.get_slice(key)
                shapes[key] = tuple(piece.get_shape())
                if piece.get_dtype() not in _DTYPES:
                    raise InputError(
                        f"{path} stores {key} as {piece.get_dtype()}, which is not supported: give another file"
                    )
                dtypes[key] = _DTYPES[piece.get_dtype()]
    return Header(shapes, dtypes, metadata)


def read_tensors(source: TensorSource) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a checkpoint one at a time; tensors are views of the memory-mapped file if possible."""
    if isinstance(source, Mapping):
        yield from source.items()
        return
    for path in expand(source):
        if path.suffix in _PICKLES:
            state = _open_pickle(path)
            while state:
                key = next(iter(state))
                yield key, state.pop(key)
            continue
        with _opened(path) as file:
            for key in list(file.keys()):
                yield key, file.get_tensor(key)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        # The file is memory-mapped: reading a tensor needs no extra memory.
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as problem:
        raise InputError(f"{path} is not a complete safetensors file ({problem}): copy or download it again") from None
    with handle as file:
        try:
            yield file
        except SafetensorError as problem:
            raise InputError(f"{path} cannot be read ({problem}): copy or download it again") from None


def _open_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = _load_pickle(path)
    except pickle.UnpicklingError as problem:
        refused = re.search(r"GLOBAL (\S+)", str(problem))
        if refused:
            raise InputError(
                f"{path} contains code ({refused[1]}), which is not loaded for safety: use a safetensors file"
            ) from None
        raise InputError(f"{path} is not a readable checkpoint: copy or download it again") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as problem:
        raise InputError(f"{path} cannot be read ({str(problem).splitlines()[0]}): copy or download it again") from None
    while isinstance(state, dict) and len(state) == 1 and next(iter(state)) in _WRAPPERS:
        state = next(iter(state.values()))
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
    ):
        raise InputError(f"{path} is not a state dict of tensors: give another file")
    return dict(state)


def _load_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as problem:
        if "mmap can only be used" not in str(problem):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the legacy format cannot be memory-mapped


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in a hidden folder next to `path`; it is flushed and renamed to `path` at the end.

    The folder is removed in any case; one left by a killed process has the host and process in its name,
    `.STEM.HOST~PROCESS~RANDOM`. It is a folder because some writers create temporary files next to their output.
    """
    target = Path(path)
    with _beside(target) as folder:
        temporary = folder / f"new{target.suffix}"  # keep the suffix: some writers choose the format by it
        yield temporary
        flush(temporary)
        os.replace(temporary, target)
        flush(target.parent)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder to fill next to `path`; its files are flushed and it is renamed to `path` at the end.

    An existing folder is moved to `OLD` in the hidden folder and removed only after the new one is in place. If the
    process is killed in between both remain, and `caching.remains.put_back` restores the new one.
    """
    target = Path(path)
    with _beside(target) as folder:
        temporary = folder / NEW / target.name  # has the target's name, so that it can be restored
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            flush(file)
        flush(temporary)
        if target.exists():
            _change_places(target, temporary, aside=folder / OLD / target.name)
        else:
            os.replace(temporary, target)
        flush(target.parent)


def _change_places(target: Path, new: Path, *, aside: Path) -> None:
    """Move a folder aside and a new one to its place; undo the first move if the second fails."""
    aside.parent.mkdir()
    try:
        os.replace(target, aside)
        os.replace(new, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.replace(aside, target)
        raise


@contextlib.contextmanager
def replacing_set(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder next to `path`; at the end its files are flushed and moved next to `path` one by one.

    They are moved in name order, JSON files, which describe the others, last; existing JSON files are removed first.
    """
    target = Path(path)
    with _beside(target) as folder:
        yield folder
        files = sorted(folder.iterdir(), key=lambda file: (file.suffix == ".json", file.name))
        for file in files:
            flush(file)
        for file in files:
            if file.suffix == ".json":
                target.with_name(file.name).unlink(missing_ok=True)
        for file in files:
            os.replace(file, target.with_name(file.name))
        flush(target.parent)


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Create a hidden folder next to `target` for the duration of writing; OSError is raised as InputError."""
    folder: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=hidden_prefix(target), dir=target.parent))
        yield folder
    except OSError as problem:
        raise InputError(f"cannot write {target}: {problem.strerror or problem}") from None
    finally:
        # A folder that was moved away but not replaced is kept: `caching.remains.put_back` restores it.
        if folder is not None and (target.exists() or not (folder / OLD).exists()):
            shutil.rmtree(folder, ignore_errors=True)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; tensors are moved to the CPU and made contiguous."""
    whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with replacing(path) as temporary:
        temporary.touch()
        usual = temporary.stat().st_mode
        try:
            save_file(whole, temporary, metadata=dict(metadata or {}))
        except SafetensorError as problem:
            raise InputError(f"cannot write {path}: {problem}") from None
        temporary.chmod(usual)  # safetensors makes files readable by the owner only


def read_parts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what `save_parts` wrote, on the CPU. Raises InputError for a file with anything but plain values."""
    try:
        parts: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as problem:
        raise InputError(f"{path} cannot be read: {str(problem).splitlines()[0]}") from None
    return parts


def save_parts(path: str | os.PathLike[str], parts: Mapping[str, Any]) -> None:
    """Write nested dicts and lists of tensors, numbers and text. Raises OSError for a full disk.

    Only the elements of a view are written; torch's writer would write its whole storage.
    """
    try:
        with open(path, "wb") as file:
            torch.save(_without_views(dict(parts)), file)
    except RuntimeError as problem:
        # torch's writer reports positions in its file; the disk's error is its context.
        behind = problem.__context__
        raise behind if isinstance(behind, OSError) else OSError(str(problem).splitlines()[0]) from None


def _without_views(value: Any) -> Any:
    """Copy each tensor in nested dicts and lists whose storage is larger than itself."""
    if isinstance(value, Tensor):
        is_view = value.untyped_storage().nbytes() > value.numel() * value.element_size()
        return value.detach().clone() if is_view else value
    if type(value) is dict:
        return {key: _without_views(member) for key, member in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_views, value))
    return value


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise InputError now, naming the folder, if it is not writable."""
    path = Path(folder)
    check_local(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=PROBE):
            pass
    except OSError as problem:
        raise InputError(f"cannot write to {path}: {problem.strerror or problem}") from None


_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
