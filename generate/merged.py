"""Save the DiT with merged LoRA files as a checkpoint."""

from pathlib import Path

import torch

from generate.preflight import check_loras
from generate.settings import GenerateSettings
from networks.merge import merged
from wan_train.assemble import WeightedLora
from wan_train.errors import InputError
from wan_train.file_names import check_name
from wan_train.log import get_logger
from wan_train.models.loading import check_dit, linear_shapes, official_shapes
from wan_train.models.variants import VARIANTS
from wan_train.models.weights import dit_rename, renamed
from wan_train.quantization.stored import read_scales, unscaled
from wan_train.remote.addresses import is_remote, shown
from wan_train.shards import expand
from wan_train.storage import check_writable, read_header, read_tensors
from wan_train.tensor_writer import Row, write_tensors

log = get_logger(__name__)


def check_merged(settings: GenerateSettings, path: str) -> list[WeightedLora]:
    """Return the LoRA files to merge. Raises InputError, reading headers only, if they cannot be merged or written."""
    if is_remote(path):
        raise InputError(f"--save_merged_model {shown(path)} is a URL: give a local .safetensors file")
    if not path.endswith(".safetensors"):
        raise InputError(f"--save_merged_model {path} must end in .safetensors")
    if not settings.dit.dit:
        raise InputError("--dit is missing: give the DiT checkpoint")
    if warning := check_dit(settings.dit.dit, VARIANTS[settings.dit.task]):
        log.warning(warning)
    given = (settings.experts.dit_high_noise, *settings.lora.lora_weight_high_noise)
    if any(given):
        raise InputError(f"--save_merged_model merges one model: give {given[0] or given[1]} as --dit or --lora_weight")
    loras = check_loras(settings)
    if not loras:
        raise InputError("--save_merged_model requires --lora_weight: give at least one LoRA file")
    check_name(path, "give a shorter --save_merged_model")
    if Path(path).is_dir():
        raise InputError(f"--save_merged_model {path} is a folder: give a file name")
    read = {file.resolve() for source in (settings.dit.dit, *settings.lora.lora_weight) for file in expand(source)}
    if Path(path).resolve() in read:
        raise InputError(f"--save_merged_model {path} would overwrite an input file: give another name")
    check_writable(Path(path).parent)
    return loras


def save_merged_model(settings: GenerateSettings, loras: list[WeightedLora], path: str) -> None:
    """Write the merged checkpoint with official names, one tensor in memory at a time.

    Sums are computed in float32 and rounded once, to the dtype of the stored tensor, or to bfloat16 for an 8-bit one.
    Raises InputError for a full disk.
    """
    source = settings.dit.dit
    header = read_header(source)
    rename, shapes = dit_rename(header.shapes), official_shapes(header.shapes)
    dtypes = {rename(name): dtype for name, dtype in header.dtypes.items()}
    rows = {
        name: Row(shape, torch.bfloat16 if dtypes[name].itemsize == 1 else dtypes[name])
        for name, shape in shapes.items()
    }
    names = linear_shapes(source)
    deltas = [(lora.read(names), lora.multiplier) for lora in loras]
    tensors = unscaled(renamed(read_tensors(source), rename), read_scales(source, header, rename, shapes), kept=())
    touched = {module for delta, _ in deltas for module in delta}
    write_tensors(path, rows, merged(tensors, deltas, unrounded=touched), {"format": "pt"})
    log.info("wrote %s: %s with %s", path, source, " + ".join(f"{lora.multiplier:g} x {lora.path}" for lora in loras))
