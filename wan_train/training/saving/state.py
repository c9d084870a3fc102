"""Where a run stands, on disk: all that it takes to resume as if it had never stopped.

A state is a folder: `adapter.safetensors` (its parameters by name, as they are), `run.pt` (optimizer, schedule,
averages and whatever else carries something from step to step), `samples.json` (what each sample was made of) and,
written last, `manifest.json` with the position, the configuration, which run it is of and the size of each file. The
folder is made beside its place and renamed, so a state is whole or absent. No generator's state is in it: everything
that is drawn is drawn by key.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataset.caching.contents import Content, Contents
from networks.formats.keys import is_pair
from wan_train.errors import InputError
from wan_train.storage import read_header, read_parts, read_tensors, replacing_folder, save_parts, save_tensors
from wan_train.training.saving.identity import Identity

VERSION = 1
ADAPTER, RUN, SAMPLES, MANIFEST = "adapter.safetensors", "run.pt", "samples.json", "manifest.json"


class NewerState(InputError):
    """A state that a later version of this trainer saved."""


@dataclass(frozen=True)
class Position:
    """How far a run has come: optimizer steps taken, the epoch it is in (from 1) and the steps taken in that epoch."""

    step: int = 0
    epoch: int = 1
    epoch_step: int = 0


@dataclass(frozen=True)
class State:
    """A state on disk, its manifest read; those of before runs had an identity have no `session` and began at 0."""

    folder: Path
    position: Position
    seed: int
    configuration: dict[str, str]
    session: int | None = None
    started_at: float = 0.0


def save_state(
    folder: Path,
    position: Position,
    *,
    seed: int,
    configuration: Mapping[str, str],
    parameters: Mapping[str, nn.Parameter],
    parts: Mapping[str, Any],
    identity: Identity,
    samples: Contents,
) -> None:
    """Write a state; `parts` are the `state_dict`s of what carries something over. InputError if that fails."""
    with replacing_folder(folder) as temporary:
        save_tensors(temporary / ADAPTER, {name: parameter.detach() for name, parameter in parameters.items()})
        save_parts(temporary / RUN, parts)
        rows = {item: list(content) for item, content in samples.items()}
        (temporary / SAMPLES).write_text(json.dumps(rows, separators=(",", ":")), encoding="utf-8")
        manifest = {
            "version": str(VERSION),
            "run": identity.row(),
            "position": asdict(position),
            "seed": seed,
            "configuration": dict(configuration),
            "sizes": {name: (temporary / name).stat().st_size for name in (ADAPTER, RUN, SAMPLES)},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def open_state(folder: Path) -> State:
    """The state in a folder. InputError that says what is wrong with one that is not whole, and NewerState for one of
    a later version."""
    if not (folder / MANIFEST).is_file():
        raise InputError(_explain_wrong_path(folder))
    return parse_state(folder, (folder / MANIFEST).read_bytes, lambda name: (folder / name).stat().st_size)


def parse_state(folder: Path, read: Callable[[], bytes], size_of: Callable[[str], int]) -> State:
    """The state whose manifest is what `read` returns, if its files, by name, have the sizes in bytes that it says.
    Raises as `open_state` does."""
    try:
        manifest = json.loads(read().decode("utf-8"))
        if int(manifest["version"]) > VERSION:
            raise NewerState(
                f"--resume {folder} is a state of version {manifest['version']}, this trainer reads up to {VERSION}: "
                "update wan-train, or give another state"
            )
        for name, size in manifest["sizes"].items():
            if size_of(name) != size:
                raise InputError(f"--resume {folder}: {name} is not whole: give another state")
        run = manifest.get("run", {})
        return State(
            folder=folder,
            position=Position(**manifest["position"]),
            seed=int(manifest["seed"]),
            configuration=dict(manifest["configuration"]),
            session=int(run["session"]) if run else None,
            started_at=float(run["started_at"]) if run else 0.0,
        )
    except (KeyError, TypeError, ValueError, OSError, AttributeError) as problem:
        if isinstance(problem, InputError):
            raise
        raise InputError(f"--resume {folder}: {MANIFEST} cannot be read ({problem}): give another state") from None


def _explain_wrong_path(path: Path) -> str:
    """What `--resume` was given that is not a state, and what to give instead."""
    if path.is_dir():
        inside = sorted(each for each in path.iterdir() if (each / MANIFEST).is_file())
        if inside:
            shown = ", ".join(map(str, inside[-3:]))
            return f"--resume {path} is not a state, but holds {len(inside)} ({shown}): give one of them"
        return f"--resume {path} has no {MANIFEST}: it is not a state of this trainer, or not a whole one"
    if not path.exists():
        return f"--resume {path} is not there: give a state folder, or auto for the newest"
    if (path.parent / MANIFEST).is_file():
        return f"--resume {path} is a file of a state: give its folder, --resume {path.parent}"
    begin = f"--network_weights {path}"
    label = "a file"
    if path.suffix == ".safetensors":
        is_lora = any(map(is_pair, read_header(path).shapes))
        label, begin = ("a LoRA file", begin) if is_lora else ("a checkpoint", f"--dit {path}")
    state = path.with_name(f"{path.stem}-state")
    kept = f"--resume {state}, which was saved with it" if (state / MANIFEST).is_file() else "--resume FOLDER-state"
    start = f", or start anew from what it learnt with {begin}" if label != "a file" else ""
    return (
        f"--resume {path} is {label}, which does not hold the optimizer: give a state folder (of --save_state), "
        f"{kept}{start}"
    )


def read_samples(state: State) -> Contents | None:
    """What each sample was made of when a state was saved; None for states that do not know it. InputError for a file
    that cannot be read."""
    path = state.folder / SAMPLES
    if not path.is_file():
        return None
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {str(item): Content(*map(str, row)) for item, row in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        raise InputError(f"--resume {state.folder}: {SAMPLES} cannot be read ({problem}): give another state") from None


def load_state(state: State, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """Give the parameters their saved values, bit for bit, and return the saved parts."""
    saved = dict(read_tensors(state.folder / ADAPTER))
    if {name: tuple(t.shape) for name, t in saved.items()} != {n: tuple(p.shape) for n, p in parameters.items()}:
        raise InputError(f"--resume {state.folder} belongs to a different network: resume with the original options")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    return read_parts(state.folder / RUN)


def differences(saved: Mapping[str, str], current: Mapping[str, str], defaults: Mapping[str, str]) -> list[str]:
    """What of the configuration is not as it was, in words. An option that one of the two does not name is at its
    default there: it did not exist yet, or does not concern the run."""
    told = []
    for name in dict.fromkeys([*saved, *current]):
        before, now = (side.get(name, defaults.get(name, "not set")) for side in (saved, current))
        if before != now:
            told.append(f"{name} was {before}, is {now}")
    return told


def remove(paths: Iterable[Path]) -> None:
    """Delete files and state folders that newer ones have replaced."""
    for path in paths:
        if path.is_dir():
            # The manifest first: what is half deleted must not pass for a state.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
