"""A folder of checkpoints, official or of diffusers: which of its files are the DiT, the VAE and the encoders.

A file is told by the names and shapes in its header, not by what it is called; only which of two experts a DiT is
stands in no header.
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
# What is done with one kind of model alone, and the options of it.
_ALONE = {"--latent_path": ("--vae",), "--save_merged_model": ("--dit", "--dit_high_noise")}
_TOKENIZERS = ("spiece.model", "tokenizer.json")


@dataclass(frozen=True)
class _Folder:
    """The checkpoints of a folder by path, with their headers, what does not read, and the folders of tokenizers."""

    path: Path
    headers: dict[Path, Header] = field(default_factory=dict)
    unread: dict[Path, str] = field(default_factory=dict)
    tokenizers: list[Path] = field(default_factory=list)

    def shown(self, paths: Iterable[Path]) -> str:
        """Paths in this folder as a list."""
        return ", ".join(str(path.relative_to(self.path)) for path in paths)


def with_found_files(argv: Sequence[str], alone: Mapping[str, bool]) -> list[str]:
    """The command line with the checkpoints of its `--ckpt_dir` in front, so that what was given itself wins.

    `alone` has every flag that the tool knows: those of models are looked for. The log says which file was taken for
    what. InputError that names the candidates for what the folder lacks or has several of.
    """
    flag, folder = _given(argv)
    if not os.path.isdir(folder):
        raise InputError(f"{flag} {folder} is not a folder: give the one that a model was downloaded to")
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
                f"{flag} {folder} has {len(candidates)} files that could be {name}"
                f"{f' of --task {task}' if task else ''} ({content.shown(candidates)}): choose with {name}"
            )
        if candidates:
            found[name] = candidates[0]
        elif name != "--tokenizer" and not (
            name == "--clip" and variant and variant.images and variant.images.optional
        ):
            missing.append(name)
    if missing:
        raise InputError(_tell_missing(f"{flag} {folder}", missing, task, content))
    for name, path in found.items():
        log.info("%s: took %s for %s", flag, content.shown([path]), name)
    return [*(f"{name}={path}" for name, path in found.items()), *argv]


def _given(argv: Sequence[str]) -> tuple[str, str]:
    """The flag as it was written, and the folder."""
    return next((flag, folder) for flag in CKPT_FLAGS if (folder := named_file(argv, flag)) is not None)


def _default_task() -> str:
    return DitSettings().task


def _wanted_flags(variant: Variant | None) -> list[str]:
    """The options of the models that a task has; default: those of the VAE and the text encoder."""
    experts = ["--dit_high_noise"] if variant and variant.experts else []
    return ["--dit", *experts, "--vae", "--t5", "--tokenizer", *(["--clip"] if variant and variant.reads_clip else [])]


def _tell_missing(where: str, missing: Sequence[str], task: str, content: _Folder) -> str:
    named = {path: identify(header.shapes) for path, header in content.headers.items()}
    holds = "; ".join(f"{content.shown([path])} is {kind}" for path, kind in sorted(named.items()))
    unread = "".join(f"; {content.shown([path])} does not read: {why}" for path, why in content.unread.items())
    return (
        f"{where} has nothing for {' and '.join(missing)}{f' of --task {task}' if task else ''}"
        f" (it holds {holds or 'no checkpoint'}{unread}): give {'it' if len(missing) == 1 else 'them'} beside, or"
        " another folder"
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
    """The checkpoints right in a folder; of a set its index, or its first shard."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    entries = [path for path in files if path.name.endswith(f".safetensors{INDEX}")]
    entries += [path for path in files if path.suffix in _SUFFIXES]
    kept: list[Path] = []
    known: set[Path] = set()
    for path in entries:
        if path in known:
            continue
        kept.append(path)
        with suppress(InputError):  # told when it is read
            known |= set(expand(path))
    return kept


def _of_kind(content: _Folder, model_kind: str) -> dict[Path, Header]:
    return {path: header for path, header in content.headers.items() if model_kind in identify(header.shapes)}


def _dits(content: _Folder, variant: Variant | None) -> list[Path]:
    """The DiTs that a task is for; those of its published size, if there are any."""
    assert variant is not None, "a DiT is looked for where there is a task"
    shapes = {path: official_shapes(header.shapes) for path, header in _of_kind(content, "DiT").items()}
    fitting = {path: found for path, found in shapes.items() if channels_of(found) in channels_for(variant)}
    sized = [path for path, found in fitting.items() if found["patch_embedding.weight"][0] == variant.dim]
    return sized or list(fitting)


def _of_expert(*, high: bool) -> Callable[[_Folder, Variant | None], list[Path]]:
    """Finds the DiT of one expert, or the only one of a task that has no experts; where nothing tells the experts
    apart, both."""

    def find(content: _Folder, variant: Variant | None) -> list[Path]:
        found = _dits(content, variant)
        if variant is None or variant.experts is None:
            return found
        told = {path: _is_high(path.relative_to(content.path)) for path in found}
        return [path for path, is_high in told.items() if is_high in (high, None)]

    return find


def _is_high(path: Path) -> bool | None:
    """Whether a DiT is the expert for high noise, by its path in the folder: official and ComfyUI's names say high or
    low; in Wan2.2's folders for diffusers `transformer` takes the high noise, `transformer_2` the low."""
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
    """The folders of the text encoder's tokenizer: of Wan2.1's image models there is another, of CLIP's text side."""
    return [path for path in content.tokenizers if not (path / "sentencepiece.bpe.model").is_file()]


_FINDERS: dict[str, Callable[[_Folder, Variant | None], list[Path]]] = {
    "--dit": _of_expert(high=False),
    "--dit_high_noise": _of_expert(high=True),
    "--vae": _vaes,
    "--t5": lambda content, variant: list(_of_kind(content, "T5 encoder") | _of_kind(content, "UMT5")),
    "--tokenizer": _tokenizers,
    "--clip": lambda content, variant: list(_of_kind(content, "CLIP")),
}
