"""Names of what a run saves, and the saving of an adapter."""

from collections.abc import Mapping
from pathlib import Path

from networks.adapter import Adapter
from networks.hashes import add_hashes
from wan_train.precision import dtype_of
from wan_train.storage import save_tensors
from wan_train.training.settings import SaveSettings


def final_path(save: SaveSettings) -> Path:
    """OUTPUT_DIR/NAME.safetensors, the file of a finished run."""
    return Path(save.output_dir) / f"{save.output_name}.safetensors"


def epoch_path(save: SaveSettings, epoch: int) -> Path:
    """OUTPUT_DIR/NAME-000001.safetensors, after epoch 1."""
    return Path(save.output_dir) / f"{save.output_name}-{epoch:06d}.safetensors"


def step_path(save: SaveSettings, step: int) -> Path:
    """OUTPUT_DIR/NAME-step00000001.safetensors, after step 1."""
    return Path(save.output_dir) / f"{save.output_name}-step{step:08d}.safetensors"


def save_adapter(path: Path, adapter: Adapter, save: SaveSettings, metadata: Mapping[str, str]) -> None:
    """Write the adapter's tensors in `--save_precision`, with metadata and its hashes."""
    dtype = dtype_of(save.save_precision)
    # Single numbers (alpha) stay whole: bf16 would turn 1.3 into 1.297.
    exported = adapter.export().items()
    tensors = {name: tensor.detach().to("cpu", dtype if tensor.ndim else None) for name, tensor in exported}
    save_tensors(path, tensors, add_hashes(tensors, metadata))
