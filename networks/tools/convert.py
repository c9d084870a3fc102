"""Convert LoRA files between key namings; the effect of the LoRA stays the same."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from networks.deltas.lora import LoraDelta
from networks.formats.files import diffusers_state, kohya_state, peft_state, read_lora
from networks.formats.hashes import add_hashes
from networks.formats.keys import possible_modules
from networks.formats.peft_config import METADATA_KEY
from networks.settings import ConvertLoraSettings, ConvertSettings
from wan_train.cli import choose
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.shards import expand
from wan_train.storage import read_header, read_tensors, save_tensors

log = get_logger(__name__)

WRITERS: dict[str, Callable[[Mapping[str, LoraDelta], str], dict[str, Tensor]]] = {
    "other": peft_state,
    "default": lambda deltas, prefix: kohya_state(deltas),
    "diffusers": lambda deltas, prefix: diffusers_state(deltas),
}


def main(settings: ConvertLoraSettings) -> None:
    """Read, rename and write. Raises InputError for an unreadable file, one that is not a LoRA, or an unwritable
    output."""
    convert = settings.convert
    write = choose("target", convert.target, WRITERS)
    _check_paths(convert)
    header = read_header(convert.input)
    deltas = read_lora(convert.input, possible_modules(header.shapes))
    source = dict(read_tensors(convert.input))
    tensors = write(deltas, convert.diffusers_prefix.rstrip("."))
    metadata = dict(header.metadata)
    if _same(tensors, source):
        log.info("%s already has the key naming of --target %s", convert.input, convert.target)
        tensors = source
    else:
        metadata.pop(METADATA_KEY, None)  # its alpha is now in the tensors
    save_tensors(convert.output, tensors, add_hashes(tensors, metadata))
    log.info("wrote %s: %d modules", convert.output, len(deltas))


def _same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k].float(), theirs[k].float()) for k in ours)


def _check_paths(convert: ConvertSettings) -> None:
    output = Path(convert.output)
    if output.suffix != ".safetensors":
        raise InputError(f"--output {output} must end in .safetensors")
    if output.is_dir():
        raise InputError(f"--output {output} is a folder: give a file")
    if output.exists() and any(output.samefile(path) for path in expand(convert.input)):
        raise InputError(f"--output {output} is the input file: give a different name")
