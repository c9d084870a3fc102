"""Names of saved files, saving of adapters and weights, and removal of old checkpoints."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from networks.formats.hashes import add_hashes
from networks.moments import EMA, EPOCH, STEP
from wan_train.precision import dtype_of
from wan_train.shards import names_of
from wan_train.storage import save_tensors
from wan_train.tensor_writer import Row, write_set
from wan_train.training.saving.settings import SaveSettings

FILE, EMA_FILE, STATE = ".safetensors", f"{EMA}.safetensors", "-state"  # suffixes after NAME and the moment


def path_of(save: SaveSettings, moment: str, ending: str, part: str | None = None) -> Path:
    """Return OUTPUT_DIR/NAME, followed by the part (an expert or a LoRA), if there are several, the moment ("" for the
    end of the run), and FILE, EMA_FILE or STATE."""
    return Path(save.output_dir) / f"{_name(save, part)}{moment}{ending}"


def _name(save: SaveSettings, part: str | None) -> str:
    return f"{save.output_name}_{part}" if part else save.output_name


def save_adapter(
    path: Path, exported: Mapping[str, Tensor], save: SaveSettings, metadata: Mapping[str, str]
) -> list[Path]:
    """Write an adapter's tensors in `--save_precision`, with metadata and hashes; return the file."""
    dtype = dtype_of(save.save_precision)
    # Scalars (alpha) keep their precision: bf16 would turn 1.3 into 1.297.
    tensors = {name: tensor.detach().to("cpu", dtype if tensor.ndim else None) for name, tensor in exported.items()}
    # The hashes identify LoRA files in other tools; computing them needs a copy of the file in memory.
    save_tensors(path, tensors, add_hashes(tensors, metadata))
    return [path]


def save_weights(
    path: Path, exported: Mapping[str, Tensor], save: SaveSettings, metadata: Mapping[str, str]
) -> list[Path]:
    """Write a model's tensors in `--save_precision`, one at a time, in shards of `--max_shard_size`; return the
    files."""
    dtype = dtype_of(save.save_precision)
    rows = {name: Row(tuple(tensor.shape), dtype) for name, tensor in exported.items()}
    return write_set(path, rows, exported, metadata, save.shard_bytes)


def outlived(
    save: SaveSettings,
    *,
    epoch: int,
    step: int,
    parts: Sequence[str | None] = (None,),
    is_own: Callable[[Path], bool] = lambda path: True,
) -> list[Path]:
    """Return the files that `--save_last_n_...` no longer keeps after this epoch and step, for all parts.

    The last N saved epochs are kept, and the steps among the last N steps. States are kept like their files unless they
    have their own option. Files that are not `is_own`, of another run of this name, are neither counted nor removed.
    """
    epochs, steps = save.save_last_n_epochs, save.save_last_n_steps
    epoch_states = save.save_last_n_epochs_state or epochs
    step_states = save.save_last_n_steps_state or steps
    gone: list[Path] = []
    files = [(_name(save, part), ending, epochs, steps) for part in parts for ending in (FILE, EMA_FILE)]
    for name, ending, last_epochs, last_steps in (*files, (save.output_name, STATE, epoch_states, step_states)):
        saved = _numbered(save, name, EPOCH, ending, is_own) if last_epochs else []
        gone += [path for number, path in saved if last_epochs and number not in _last(saved, last_epochs, epoch)]
        by_step = _numbered(save, name, STEP, ending, is_own) if last_steps else []
        gone += [path for number, path in by_step if last_steps and number <= step - last_steps]
    return gone


def _last(saved: list[tuple[int, Path]], count: int, newest: int) -> set[int]:
    """Return the last `count` numbers up to the newest, and all beyond it, which belong to an earlier run and are
    kept."""
    numbers = sorted({number for number, _ in saved})  # the shards of a checkpoint share its number
    return {n for n in numbers if n > newest} | set([n for n in numbers if n <= newest][-count:])


def _numbered(
    save: SaveSettings, name: str, moment: str, ending: str, is_own: Callable[[Path], bool]
) -> list[tuple[int, Path]]:
    """Return the existing files with names of this kind of moment, and the numbers in them."""
    stem = rf"{re.escape(name)}{moment}{re.escape(ending.removesuffix(FILE))}"
    pattern = re.compile(names_of(stem, FILE) if ending.endswith(FILE) else stem)
    matches = ((pattern.fullmatch(path.name), path) for path in Path(save.output_dir).iterdir())
    return [(int(match[1]), path) for match, path in matches if match and is_own(path)]
