"""Extract a LoRA from a full fine-tuning: the best pair of a given rank for the difference of each matrix.

The pair with the least squared error is the truncated singular value decomposition (Eckart and Young 1936). Both
checkpoints are memory-mapped, and one matrix at a time is loaded.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from networks.deltas.lora import LoraDelta
from networks.formats.files import kohya_state
from networks.formats.hashes import add_hashes
from networks.formats.keys import possible_modules
from networks.settings import ExtractLoraSettings, ExtractSettings
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.stacks import read_block_name
from wan_train.models.weights import dit_rename, require_kind
from wan_train.precision import default_device, dtype_of
from wan_train.shards import expand
from wan_train.storage import check_writable, read_header, read_tensors, save_tensors

log = get_logger(__name__)

_FULL = 256  # up to this number of rows or columns the full decomposition is fast
_OVERSAMPLING, _POWERS = 16, 4  # Halko, Martinsson and Tropp 2011 for the larger ones


@dataclass(frozen=True)
class Extracted:
    """The pair of a matrix, and the sums of squares of the change and of the residual."""

    delta: LoraDelta
    change: float
    left: float


def main(settings: ExtractLoraSettings) -> None:
    """Compare, decompose and write. Raises InputError for files that are not a DiT, are 8-bit, or do not match."""
    extract = settings.extract
    device, dtype = default_device(extract.device or None), dtype_of(extract.save_precision)
    _check_output(extract)
    base, tuned = _open(extract.base, "--base"), _open(extract.tuned, "--tuned")
    _require_fit(base, tuned)
    modules = set(possible_modules(tuned))
    kept: dict[str, Extracted] = {}
    lost: list[str] = []
    for name, before, after in _changed(base, tuned):
        module = name.removesuffix(".weight")
        if module != name and module in modules:
            kept[module] = truncate(before, after, extract.rank, device=device, dtype=dtype)
        else:
            lost.append(name)
    if not kept:
        raise InputError("--base and --tuned do not differ in any matrix that a LoRA can change: nothing to extract")
    _report(kept, lost)
    tensors = kohya_state({module: result.delta for module, result in kept.items()})
    save_tensors(extract.output, tensors, add_hashes(tensors, _metadata(extract)))
    log.info("wrote %s: %d modules", extract.output, len(kept))


@torch.no_grad()
def truncate(before: Tensor, after: Tensor, rank: int, *, device: torch.device, dtype: torch.dtype) -> Extracted:
    """Return the pair of at most `rank` for after - before, (out, in) or (out, in, k, k), rounded to `dtype`, with
    scale 1.

    The square root of each singular value goes to either factor. Equal inputs give equal pairs: the result is
    deterministic.
    """
    window = after.shape[2:]  # (k, k) of a convolution
    change = (after.to(device, torch.float32) - before.to(device, torch.float32)).flatten(1)
    rank = min(rank, *change.shape)
    left, values, right = _decompose(change, rank)
    roots = values[:rank].sqrt()
    up = (left[:, :rank] * roots).to(dtype)
    down = (roots[:, None] * right[:, :rank].T).to(dtype).contiguous()
    total = float(change.square().sum())
    LoraDelta(down, up, 1.0).add_to(change, -1.0)
    down, up = down.view(rank, -1, *window), up.view(*up.shape, *(1 for _ in window))
    return Extracted(LoraDelta(down.cpu(), up.cpu(), 1.0), total, float(change.square().sum()))


def _decompose(change: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, k), S (k,) and V (in, k) with k >= rank."""
    wide = rank + _OVERSAMPLING
    if min(change.shape) <= max(_FULL, wide):
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        return left, values, right.T
    with torch.random.fork_rng(devices=[change.device] if change.is_cuda else []):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(change, q=wide, niter=_POWERS)
    return left, values, right


def _open(source: str, flag: str) -> dict[str, Tensor]:
    """Return the tensors of a DiT by official name, as views of its file. Raises InputError for 8-bit and for other
    models."""
    header = read_header(source)
    require_kind(header.shapes, "DiT", f"{flag} {source}")
    eight = [name for name, dtype in header.dtypes.items() if dtype.itemsize == 1]
    if eight:
        raise InputError(f"{flag} {source} stores {eight[0]} in 8 bits: give the checkpoint from before quantization")
    rename = dit_rename(header.shapes)
    return {rename(name): tensor for name, tensor in read_tensors(source)}


def _require_fit(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
    alone = sorted(base.keys() ^ tuned.keys())
    if alone:
        raise InputError(
            f"only one of --base and --tuned has {alone[0]} ({len(alone)} in total): give checkpoints of the same model"
        )
    for name, tensor in base.items():
        if tensor.shape != tuned[name].shape:
            shapes = f"{list(tensor.shape)} and {list(tuned[name].shape)}"
            raise InputError(
                f"--base and --tuned have different shapes of {name}, {shapes}: give checkpoints of the same model"
            )


def _changed(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, before and after of each tensor that differs after rounding to the coarser of both dtypes."""
    for name, before in base.items():
        after = tuned[name]
        coarser = max(before.dtype, after.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        if not torch.equal(before.to(coarser), after.to(coarser)):
            yield name, before, after


def _report(kept: Mapping[str, Extracted], lost: list[str]) -> None:
    """Log the share of the squared change that is kept, per block and in total, and the tensors a LoRA cannot
    represent."""
    parts: dict[str, list[Extracted]] = defaultdict(list)
    for module, result in kept.items():
        name = read_block_name(module)
        parts["outside the blocks" if name is None else name.block].append(result)
    for part, results in parts.items():
        log.info("%s: %.2f%% of the change kept in %d modules", part, 100 * kept_share(results), len(results))
    log.info("total: %.2f%% of the change of %d matrices kept", 100 * kept_share(list(kept.values())), len(kept))
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        log.warning("a LoRA cannot represent the changes of %s%s; they are omitted", ", ".join(lost[:3]), more)


def kept_share(results: list[Extracted]) -> float:
    """Return the share of the squared changes that the pairs keep, from 0 to 1."""
    return 1 - sum(result.left for result in results) / sum(result.change for result in results)


def _metadata(extract: ExtractSettings) -> dict[str, str]:
    return {
        "ss_network_module": "networks.lora_wan",
        "ss_network_dim": str(extract.rank),
        "ss_network_alpha": str(float(extract.rank)),
        "ss_sd_model_name": Path(extract.base).name,
        "wan_train_extracted_from": Path(extract.tuned).name,
    }


def _check_output(extract: ExtractSettings) -> None:
    output = Path(extract.output)
    if output.suffix != ".safetensors" or output.is_dir():
        raise InputError(f"--output {output} must be a file that ends in .safetensors")
    for source in (extract.base, extract.tuned):
        if output.exists() and any(output.samefile(path) for path in expand(source)):
            raise InputError(f"--output {output} is one of the checkpoints: give a different name")
    check_writable(output.parent)
