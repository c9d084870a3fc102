"""Find the DiT, VAE and encoders in a checkpoint folder, as published by Wan-AI or in diffusers format.

Files are identified by the names and shapes in their headers, not by their file names. Only the two experts of a task
are told apart by their paths.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from wan_train.config_file import named_file
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.dit.kinds import channels_for, channels_of
from wan_train.models.loading import official_shapes
from wan_train.models.settings import CKPT_FLAGS, DitSettings
from wan_train.models.vae.vae import check_vae
from wan_train.models.variants import VARIANTS, Variant
from wan_train.models.weights import identify
from wan_train.shards import INDEX, expand
from wan_train.storage import Header, read_header

log = get_logger(__name__)

_DEPTH = 2  # folders below the given one: google/umt5-xxl
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# Options that need only some of the models -> the options of those models.
_ALONE = {"--latent_path": ("--vae",), "--save_merged_model": ("--dit", "--dit_high_noise")}
_TOKENIZERS = ("spiece.model", "tokenizer.json")


@dataclass(frozen=True)
class _Folder:
    """Checkpoint headers by path, the errors of unreadable files by path, and folders with a tokenizer."""

    path: Path
    headers: dict[Path, Header] = field(default_factory=dict)
    unread: dict[Path, str] = field(default_factory=dict)
    tokenizers: list[Path] = field(default_factory=list)

    def shown(self, paths: Iterable[Path]) -> str:
        """Format paths relative to this folder as a comma-separated list."""
        return ", ".join(str(path.relative_to(self.path)) for path in paths)


def with_found_files(argv: Sequence[str], alone: Mapping[str, bool]) -> list[str]:
    """Return the command line with options for the checkpoints in `--ckpt_dir` prepended, so that explicit options win.

    `alone` maps every flag of the tool to whether it takes no value; only flags in it are searched for. Logs the file
    chosen for each option. Raises InputError, listing the candidates, if a model is missing or ambiguous.
    """
    flag, folder = _given(argv)
    if not os.path.isdir(folder):
        raise InputError(f"{flag} {folder} is not a folder: give the folder that the model was downloaded to")
    task = named_file(argv, "--task") or ("" if "--dit" not in alone else _default_task())
    variant = VARIANTS.get(task)  # an unknown one is refused by the option itself
    only = next((flags for said, flags in _ALONE.items() if named_file(argv, said) is not None), None)
    wanted = [
        name
        for name in _wanted_flags(variant)
        if name in alone and named_file(argv, name) is None and (only is None or name in only)
    ]
    content, found, missing = _read_folder(Path(folder)), {}, []
    for name in wanted:
        candidates = _FINDERS[name](content, variant)
        if len(candidates) > 1:
            raise InputError(
                f"{flag} {folder} has {len(candidates)} candidates for {name}"
                f"{f' of --task {task}' if task else ''} ({content.shown(candidates)}): choose one with {name}"
            )
        if candidates:
            found[name] = candidates[0]
        elif name != "--tokenizer" and not (
            name == "--clip" and variant and variant.images and variant.images.optional
        ):
            missing.append(name)
    if missing:
        raise InputError(_tell_missing(f"{flag} {folder}", missing, task, content))
    if "--dit" in found and found["--dit"] == found.get("--dit_high_noise"):
        raise InputError(
            f"{flag} {folder} has one DiT ({content.shown([found['--dit']])}) for the two experts of --task {task}, and"
            " its path says neither high nor low: choose with --dit and --dit_high_noise, or give another folder"
        )
    for name, path in found.items():
        log.info("%s: using %s as %s", flag, content.shown([path]), name)
    return [*(f"{name}={path}" for name, path in found.items()), *argv]


def _given(argv: Sequence[str]) -> tuple[str, str]:
    """Return the flag as written, and its folder."""
    return next((flag, folder) for flag in CKPT_FLAGS if (folder := named_file(argv, flag)) is not None)


def _default_task() -> str:
    return DitSettings().task


def _wanted_flags(variant: Variant | None) -> list[str]:
    """Return the options of the models that a task needs; without a task those of the VAE and the text encoder."""
    experts = ["--dit_high_noise"] if variant and variant.experts else []
    return ["--dit", *experts, "--vae", "--t5", "--tokenizer", *(["--clip"] if variant and variant.reads_clip else [])]


def _tell_missing(where: str, missing: Sequence[str], task: str, content: _Folder) -> str:
    named = {path: identify(header.shapes) for path, header in content.headers.items()}
    holds = [f"{content.shown([path])}: {kind}" for path, kind in sorted(named.items())]
    holds += [f"{content.shown([path])}: not readable, {why}" for path, why in content.unread.items()]
    return (
        f"{where} has no file for {' and '.join(missing)}{f' of --task {task}' if task else ''}"
        f" (found: {'; '.join(holds) or 'no checkpoint'}): give {'it' if len(missing) == 1 else 'them'},"
        " or another folder"
    )


def _read_folder(folder: Path) -> _Folder:
    content = _Folder(folder)
    for subfolder in _folders(folder, _DEPTH):
        if any((subfolder / name).is_file() for name in _TOKENIZERS):
            content.tokenizers.append(subfolder)
        for path in _checkpoints(subfolder):
            try:
                content.headers[path] = read_header(path)
            except InputError as problem:
                content.unread[path] = str(problem)
    return content


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    for inner in sorted(folder.iterdir()) if depth else ():
        if inner.is_dir() and not inner.name.startswith("."):
            yield from _folders(inner, depth - 1)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints directly in a folder; a sharded one by its index or its first shard."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    entries = [path for path in files if path.name.endswith(f".safetensors{INDEX}")]
    entries += [path for path in files if path.suffix in _SUFFIXES]
    kept: list[Path] = []
    known: set[Path] = set()
    for path in entries:
        if path in known:
            continue
        kept.append(path)
        with suppress(InputError):  # reported when the file is read
            known |= set(expand(path))
    return kept


def _of_kind(content: _Folder, model_kind: str) -> dict[Path, Header]:
    return {path: header for path, header in content.headers.items() if model_kind in identify(header.shapes)}


def _dits(content: _Folder, variant: Variant | None) -> list[Path]:
    """Return the DiTs that fit a task; those of its published size only, if there are any."""
    assert variant is not None, "searching for a DiT requires a task"
    shapes = {path: official_shapes(header.shapes) for path, header in _of_kind(content, "DiT").items()}
    fitting = {path: found for path, found in shapes.items() if channels_of(found) in channels_for(variant)}
    sized = [path for path, found in fitting.items() if found["patch_embedding.weight"][0] == variant.dim]
    return sized or list(fitting)


def _of_expert(*, high: bool) -> Callable[[_Folder, Variant | None], list[Path]]:
    """Return a function that finds the DiT of one expert, or the only DiT of a task without experts.

    It returns both files if nothing tells the experts apart.
    """

    def find(content: _Folder, variant: Variant | None) -> list[Path]:
        found = _dits(content, variant)
        if variant is None or variant.experts is None:
            return found
        told = {path: _is_high(path.relative_to(content.path)) for path in found}
        return [path for path, is_high in told.items() if is_high in (high, None)]

    return find


def _is_high(path: Path) -> bool | None:
    """Return whether a path is the high-noise expert's; None if unknown.

    Official and ComfyUI's names contain high or low; in diffusers' folders for Wan2.2 `transformer` is the high-noise
    expert and `transformer_2` the low-noise one.
    """
    words = str(path).lower()
    if ("high" in words) != ("low" in words):
        return "high" in words
    return {"transformer": True, "transformer_2": False}.get(path.parts[0])


def _vaes(content: _Folder, variant: Variant | None) -> list[Path]:
    paths = list(_of_kind(content, "VAE"))
    return paths if variant is None else [path for path in paths if _fits(path, variant.space.channels)]


def _fits(path: Path, channels: int) -> bool:
    try:
        check_vae(path, latent_channels=channels)
    except InputError:
        return False
    return True


def _tokenizers(content: _Folder, variant: Variant | None) -> list[Path]:
    """Return the folders of text encoder tokenizers, excluding CLIP's tokenizer of Wan2.1's image models."""
    return [path for path in content.tokenizers if not (path / "sentencepiece.bpe.model").is_file()]


_FINDERS: dict[str, Callable[[_Folder, Variant | None], list[Path]]] = {
    "--dit": _of_expert(high=False),
    "--dit_high_noise": _of_expert(high=True),
    "--vae": _vaes,
    "--t5": lambda content, variant: list(_of_kind(content, "T5 encoder") | _of_kind(content, "UMT5")),
    "--tokenizer": _tokenizers,
    "--clip": lambda content, variant: list(_of_kind(content, "CLIP")),
}
