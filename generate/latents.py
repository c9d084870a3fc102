"""Decode latent files."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from generate.models import Models
from generate.output import (
    Product,
    check_length,
    check_names,
    check_target,
    is_file,
    named_stem,
    trimmed,
    write_outputs,
)
from generate.record import KEY, plain_name
from generate.remote_output import deliver
from generate.settings import OutputSettings
from wan_train.errors import InputError
from wan_train.models.variants import FRAME_STEP, VARIANTS, Variant
from wan_train.remote.mirror import Mirror
from wan_train.storage import Header, read_header, read_tensors


@dataclass(frozen=True)
class LatentFile:
    """A latent file: the key of its tensor, the shape (C, F, H, W), and the metadata."""

    path: Path
    key: str
    shape: tuple[int, ...]
    metadata: dict[str, str]

    @property
    def name(self) -> str:
        """The file name without its latent suffix."""
        return plain_name(self.path)

    @property
    def seed(self) -> str:
        """The seed in the metadata, or 0; digits only, because it becomes part of a path."""
        seed = self.metadata.get("seeds", "")
        return seed if seed.isdecimal() else "0"

    def read(self) -> Tensor:
        """Return the latents (C, F, H, W) float32."""
        return dict(read_tensors(self.path))[self.key].float().view(self.shape)


def check_latents(
    paths: Sequence[str], output: OutputSettings, variant: Variant = VARIANTS["t2v-14B"]
) -> list[LatentFile]:
    """Return the latent files of paths, which may be folders.

    Raises InputError for other files, and for a `--save_path` or `--output_type` that does not work with them.
    """
    if output.output_type not in ("video", "images"):
        raise InputError(
            f"--output_type {output.output_type} does not work with --latent_path, which decodes: use video or images"
        )
    files = [_open(file, variant.space.channels) for path in paths for file in _expand(Path(path))]
    check_target(output, len(files))
    for index, file in enumerate(files):
        check_length(output, 1 + (file.shape[1] - 1) * FRAME_STEP)
        check_names(output, _stem_of(output, file, index), sampled=False)
    twice = [file for index, file in enumerate(files) if file.name in {other.name for other in files[:index]}]
    if twice and "{index}" not in output.target:
        raise InputError(
            f"{output.target_flag} {output.target}: two files are named {twice[0].name}; add {{index}} to the path"
        )
    return files


def decode_latents(files: Sequence[LatentFile], models: Models, mirror: Mirror | None = None) -> None:
    """Decode and write each file, under its own name if `--save_path` is a folder; `mirror` uploads the results.

    The files are divided among groups of processes; the first process of each group decodes and writes, and with
    `--vae_parallel` all of them decode.
    """
    groups, output = models.groups, models.settings.output
    if not (groups.is_first or models.settings.parallel.vae_parallel):
        return
    fps = output.fps or VARIANTS[models.settings.dit.task].fps
    with models.vae() as vae:
        for index, file in list(enumerate(files))[groups.index :: groups.num_groups]:
            latents, comment = file.read(), "" if output.no_metadata else file.metadata.get(KEY, "")
            decoded = models.decode(vae, latents)
            if not groups.is_first:
                deque(decoded, maxlen=0)
                continue
            stem, frames = _stem_of(output, file, index), trimmed(decoded, output)
            for path in write_outputs(Product(latents, frames, fps, stem, comment, file.metadata, output)):
                deliver(path, mirror)


def _stem_of(output: OutputSettings, file: LatentFile, index: int) -> Path:
    stem = named_stem(output, seed=file.seed, index=index)
    return stem if is_file(output) else stem / file.name


def _expand(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*_latent.safetensors"))
    if not found:
        raise InputError(f"--latent_path {path} has no files that end in _latent.safetensors")
    return found


def _open(path: Path, channels: int) -> LatentFile:
    header = read_header(path)
    key = _key_of(header)
    shape = header.shapes[key] if key else ()
    shape = shape[1:] if len(shape) == 5 and shape[0] == 1 else shape
    if not key or len(shape) != 4 or shape[0] != channels or 0 in shape:
        raise InputError(
            f"--latent_path {path} has no latents of shape ({channels}, frames, height, width): "
            "give a file written with --output_type latent"
        )
    return LatentFile(path, key, shape, header.metadata)


def _key_of(header: Header) -> str | None:
    if "latent" in header.shapes:
        return "latent"
    return next(iter(header.shapes)) if len(header.shapes) == 1 else None
