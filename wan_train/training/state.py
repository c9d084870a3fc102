"""Where a run stands, on disk: all that it takes to go on as if it had never stopped.

A state is a folder: `adapter.safetensors` (its parameters by name, as they are), `run.pt` (optimizer, schedule,
averages and whatever else carries something from step to step) and, written last, `manifest.json` with the position,
the configuration and the size of each file. The folder is made beside its place and renamed, so a state is whole or
absent. No generator's state is in it: everything that is drawn is drawn by key.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wan_train.cli import InputError
from wan_train.storage import read_parts, read_tensors, replacing_folder, save_parts, save_tensors
from wan_train.training.save_settings import SaveSettings

VERSION = "1"
ADAPTER, RUN, MANIFEST = "adapter.safetensors", "run.pt", "manifest.json"


@dataclass(frozen=True)
class Position:
    """How far a run has come: optimizer steps taken, the epoch it is in (from 1) and the steps taken in that epoch."""

    step: int = 0
    epoch: int = 1
    epoch_step: int = 0


@dataclass(frozen=True)
class State:
    """A state on disk, its manifest read."""

    folder: Path
    position: Position
    seed: int
    configuration: dict[str, str]


def save_state(
    folder: Path,
    position: Position,
    *,
    seed: int,
    configuration: Mapping[str, str],
    parameters: Mapping[str, nn.Parameter],
    parts: Mapping[str, Any],
) -> None:
    """Write a state; `parts` are the `state_dict`s of what carries something over. InputError if that fails."""
    with replacing_folder(folder) as temporary:
        save_tensors(temporary / ADAPTER, {name: parameter.detach() for name, parameter in parameters.items()})
        save_parts(temporary / RUN, parts)
        manifest = {
            "version": VERSION,
            "position": asdict(position),
            "seed": seed,
            "configuration": dict(configuration),
            "sizes": {name: (temporary / name).stat().st_size for name in (ADAPTER, RUN)},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def open_state(folder: Path) -> State:
    """The state in a folder. InputError that says what is wrong with one that is not whole."""
    if not folder.is_dir():
        raise InputError(f"--resume {folder} is not there: give a state folder, or auto for the newest")
    if not (folder / MANIFEST).is_file():
        raise InputError(f"--resume {folder} has no {MANIFEST}: it is no state of this trainer, or not a whole one")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, size in manifest["sizes"].items():
            if (folder / name).stat().st_size != size:
                raise InputError(f"--resume {folder}: {name} is not whole: give another state")
        return State(folder, Position(**manifest["position"]), int(manifest["seed"]), dict(manifest["configuration"]))
    except (KeyError, TypeError, ValueError, OSError) as problem:
        if isinstance(problem, InputError):
            raise
        raise InputError(f"--resume {folder}: {MANIFEST} cannot be read ({problem}): give another state") from None


def newest_state(save: SaveSettings) -> State | None:
    """The whole state of this output folder and name that has come farthest."""
    whole = []
    for folder in state_folders(save):
        try:
            whole.append(open_state(folder))
        except InputError:
            continue
    return max(whole, key=lambda state: (state.position.step, state.folder.stat().st_mtime), default=None)


def state_folders(save: SaveSettings) -> list[Path]:
    """Every folder that is named like a state of this run."""
    output, name = Path(save.output_dir), save.output_name
    if not output.is_dir():
        return []
    return [path for path in output.iterdir() if path.is_dir() and _is_state_of(path.name, name)]


def _is_state_of(folder: str, name: str) -> bool:
    if not (folder.startswith(name) and folder.endswith("-state")):
        return False
    middle = folder[len(name) : -len("-state")].lstrip("-").removeprefix("step")
    return not middle or middle.isdigit()


def load_state(state: State, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """Give the parameters their saved values, bit for bit, and return the saved parts."""
    saved = dict(read_tensors(state.folder / ADAPTER))
    if {name: tuple(t.shape) for name, t in saved.items()} != {n: tuple(p.shape) for n, p in parameters.items()}:
        raise InputError(f"--resume {state.folder} is of another network: resume with the options that it began with")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    return read_parts(state.folder / RUN)


def differences(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """What of the configuration is not as it was, in words."""
    return [
        f"{name} was {saved.get(name, 'not set')}, is {current.get(name, 'not set')}"
        for name in dict.fromkeys([*saved, *current])
        if saved.get(name) != current.get(name)
    ]


def remove(paths: Iterable[Path]) -> None:
    """Delete files and state folders that newer ones have replaced."""
    for path in paths:
        if path.is_dir():
            # The manifest first: what is half deleted must not pass for a state.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
