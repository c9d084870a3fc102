"""A training state on disk: everything needed to resume as if training had not been interrupted.

A state is a folder of `adapter.safetensors` (the trained parameters by name, unconverted), `run.pt` (optimizer,
schedule, EMA and everything else carried from step to step), `samples.json` (the content of each sample) and, written
last, `manifest.json` (position, configuration, run identity and file sizes). The folder is written under a temporary
name and renamed, so a state is complete or absent. It holds no state of random generators, since all draws are keyed.
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
    """A state saved by a later version of this trainer."""


@dataclass(frozen=True)
class Position:
    """Progress of a run: optimizer steps taken, the current epoch (from 1) and the steps taken in that epoch."""

    step: int = 0
    epoch: int = 1
    epoch_step: int = 0


@dataclass(frozen=True)
class State:
    """A state on disk with its manifest read; states from before runs had identities have `session` None and
    `started_at` 0."""

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
    """Write a state; `parts` are the `state_dict`s of the parts carried from step to step. Raise InputError if that
    fails."""
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
    """Read the state in a folder. Raise InputError for one that is missing or incomplete, and NewerState for one of a
    later version."""
    if not (folder / MANIFEST).is_file():
        raise InputError(_explain_wrong_path(folder))
    return parse_state(folder, (folder / MANIFEST).read_bytes, lambda name: (folder / name).stat().st_size)


def parse_state(folder: Path, read: Callable[[], bytes], size_of: Callable[[str], int]) -> State:
    """Parse the manifest that `read` returns, and check the sizes in bytes of its files with `size_of`. Raise the same
    errors as `open_state`."""
    try:
        manifest = json.loads(read().decode("utf-8"))
        if int(manifest["version"]) > VERSION:
            raise NewerState(
                f"--resume {folder} is a state of version {manifest['version']}, this trainer reads up to {VERSION}: "
                "update wan-train, or give another state"
            )
        for name, size in manifest["sizes"].items():
            if size_of(name) != size:
                raise InputError(f"--resume {folder}: {name} is incomplete: give another state")
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
    """Explain what the path given to `--resume` is, since it is not a state, and what to give instead."""
    if path.is_dir():
        inside = sorted(each for each in path.iterdir() if (each / MANIFEST).is_file())
        if inside:
            shown = ", ".join(map(str, inside[-3:]))
            return f"--resume {path} is not a state, but contains {len(inside)} ({shown}): give one of them"
        return f"--resume {path} has no {MANIFEST}: it is not a state of this trainer, or it is incomplete"
    if not path.exists():
        return f"--resume {path} does not exist: give a state folder, or auto for the newest"
    if (path.parent / MANIFEST).is_file():
        return f"--resume {path} is a file of a state: give its folder, --resume {path.parent}"
    begin = f"--network_weights {path}"
    label = "a file"
    if path.suffix == ".safetensors":
        is_lora = any(map(is_pair, read_header(path).shapes))
        label, begin = ("a LoRA file", begin) if is_lora else ("a checkpoint", f"--dit {path}")
    state = path.with_name(f"{path.stem}-state")
    kept = f"--resume {state}, which was saved with it" if (state / MANIFEST).is_file() else "--resume FOLDER-state"
    start = f", or start a new run from it with {begin}" if label != "a file" else ""
    return (
        f"--resume {path} is {label}, which does not contain the optimizer state: give a state folder (of "
        f"--save_state), {kept}{start}"
    )


def read_samples(state: State) -> Contents | None:
    """Return the content of each sample when a state was saved; None for states that do not record it. Raise InputError
    for a file that cannot be read."""
    path = state.folder / SAMPLES
    if not path.is_file():
        return None
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {str(item): Content(*map(str, row)) for item, row in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        raise InputError(f"--resume {state.folder}: {SAMPLES} cannot be read ({problem}): give another state") from None


def load_state(state: State, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """Restore the saved parameters, bit for bit, and return the saved parts."""
    saved = dict(read_tensors(state.folder / ADAPTER))
    if {name: tuple(t.shape) for name, t in saved.items()} != {n: tuple(p.shape) for n, p in parameters.items()}:
        raise InputError(f"--resume {state.folder} belongs to a different network: resume with the original options")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    return read_parts(state.folder / RUN)


def differences(saved: Mapping[str, str], current: Mapping[str, str], defaults: Mapping[str, str]) -> list[str]:
    """Describe the differences between two configurations. An option missing from one of them has its default there: it
    did not exist yet, or does not apply to the run."""
    told = []
    for name in dict.fromkeys([*saved, *current]):
        before, now = (side.get(name, defaults.get(name, "not set")) for side in (saved, current))
        if before != now:
            told.append(f"{name} was {before}, is {now}")
    return told


def remove(paths: Iterable[Path]) -> None:
    """Delete old files and state folders."""
    for path in paths:
        if path.is_dir():
            # The manifest first: a partly deleted folder must not be taken for a state.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
