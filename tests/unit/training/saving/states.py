"""States of a few tensors, for tests of what is made of states."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataset.caching.contents import Contents
from wan_train.cli import parse
from wan_train.training.saving.identity import Identity
from wan_train.training.saving.settings import SaveSettings
from wan_train.training.saving.state import Position, save_state
from wan_train.training.settings import TrainSettings


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(3, 4, generator=generator)) for name in ("a.down.weight", "a.up.weight")}


RUN = Identity(1, 100.0)


def save(
    folder: Path,
    step: int = 3,
    seed: int = 0,
    *,
    run: Identity = RUN,
    samples: Contents | None = None,
    options: dict[str, str] | None = None,
    **parts: Any,
) -> Path:
    save_state(
        folder,
        Position(step, 2, 1),
        seed=7,
        configuration=options or {"--network_dim": "4"},
        parameters=parameters(seed),
        parts=parts,
        identity=run,
        samples=samples or {},
    )
    return folder


def anonymous(folder: Path, **changes: Any) -> Path:
    """The state as one that was saved before runs had an identity; `changes` of its manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["run"], manifest["sizes"]["samples.json"]
    (folder / "samples.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder


def saving(folder: Path, name: str = "name") -> SaveSettings:
    return SaveSettings(output_dir=str(folder), output_name=name)


def settings_of(folder: Path, *more: str) -> TrainSettings:
    words = ["--dit", "d", "--dataset_config", "c", "--output_dir", str(folder), "--output_name", "name", *more]
    return parse(TrainSettings, words)
