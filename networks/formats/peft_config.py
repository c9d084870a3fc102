"""The scale of LoRA files that store alpha in a PEFT configuration instead of tensors."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wan_train.errors import InputError
from wan_train.storage import TensorSource

METADATA_KEY = "lora_adapter_metadata"  # diffusers' metadata key for the configuration


def declared_scale(source: TensorSource, metadata: Mapping[str, str], label: str) -> Callable[[int], float]:
    """Return the scale for a rank by the PEFT configuration in the file or beside it; always 1 if there is none."""
    config = _read(source, metadata, label)
    if "lora_alpha" not in config:
        return lambda rank: 1.0
    if config.get("alpha_pattern"):
        raise InputError(
            f"{label} has an alpha_pattern, which is not supported: save it with one alpha for all modules"
        )
    alpha = config["lora_alpha"]
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InputError(f"{label} has lora_alpha {alpha!r}: it must be a number")
    root = bool(config.get("use_rslora"))
    return lambda rank: alpha / (math.sqrt(rank) if root else rank)


def _read(source: TensorSource, metadata: Mapping[str, str], label: str) -> dict[str, Any]:
    text, where = metadata.get(METADATA_KEY), f"{METADATA_KEY} in {label}"
    beside = _beside(source)
    if text is None and beside is not None:
        text, where = beside.read_text(errors="replace"), str(beside)
    try:
        config = json.loads(text or "{}")
    except ValueError:
        raise InputError(f"{where} is not JSON: repair or remove it") from None
    if not isinstance(config, dict):
        raise InputError(f"{where} is not a PEFT configuration: repair or remove it")
    # diffusers prefixes each entry with the name of the pipeline component.
    return {key.removeprefix("transformer."): value for key, value in config.items()}


def _beside(source: TensorSource) -> Path | None:
    """Return the adapter_config.json of a PEFT folder, given the folder or its adapter_model file."""
    if not isinstance(source, str | os.PathLike):
        return None
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    config = folder / "adapter_config.json"
    return config if (path.is_dir() or path.stem == "adapter_model") and config.is_file() else None
