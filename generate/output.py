"""Write the output files of the generator."""

import itertools
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from torch import Tensor

from generate.jobs import Job
from generate.record import KEY
from generate.settings import OutputSettings
from wan_train.errors import InputError
from wan_train.file_names import check_name
from wan_train.media_out import write_image, write_images, write_video
from wan_train.sampling.request import SampleRequest
from wan_train.storage import check_writable, save_tensors

# Suffixes with which --save_path names a file, and the output types that they are for.
_FILE_SUFFIXES = {
    ".mp4": ("video", "images", "latent", "both", "latent_images"),
    ".png": ("video", "both"),
    ".safetensors": ("latent",),
}
# Suffixes of unsupported files, which are not folder names either.
_OTHER_SUFFIXES = (".webm", ".mov", ".mkv", ".avi", ".gif", ".jpg", ".jpeg", ".webp")
_NAMES = ("{seed}", "{index}")
_LATENT = "_latent"


@dataclass(frozen=True)
class Product:
    """A result to write: latents (C, F, H, W), frames, each (H, W, 3), and the generation record.

    `frames` is None if they are not needed, and may be an iterator, which is written as it yields. `stem` is the path
    without a suffix. `comment` is the record or empty, `metadata` the other metadata of latent files.
    """

    latents: Tensor
    frames: Iterable[np.ndarray] | None
    fps: int
    stem: Path
    comment: str
    metadata: Mapping[str, str]
    settings: OutputSettings


def is_file(settings: OutputSettings) -> bool:
    """Whether `--save_path` names a file and not a folder."""
    return Path(settings.target).suffix.lower() in _FILE_SUFFIXES


def stem_of(settings: OutputSettings, job: Job, *, several: bool) -> Path:
    """Return the path of a job's files without a suffix: that of `--save_path`, or FOLDER/TIME_SEED.

    If there are several jobs, the index precedes the seed.
    """
    if is_file(settings):
        return named_stem(settings, seed=str(job.request.seed), index=job.index)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    name = f"{stamp}_{job.index:03d}_{job.request.seed}" if several else f"{stamp}_{job.request.seed}"
    return named_stem(settings, seed=str(job.request.seed), index=job.index) / name


def named_stem(settings: OutputSettings, *, seed: str, index: int) -> Path:
    """Return `--save_path` with seed and index filled in, without the suffix of a file."""
    path = Path(settings.target.replace("{seed}", seed).replace("{index}", f"{index:03d}"))
    if not is_file(settings):
        return path
    return path.with_name(path.stem.removesuffix(_LATENT) if path.suffix == ".safetensors" else path.stem)


def trimmed(frames: Iterable[np.ndarray], settings: OutputSettings) -> Iterator[np.ndarray]:
    """Yield the frames without the last `--trim_tail_frames`, by buffering that number."""
    held: deque[np.ndarray] = deque()
    for frame in frames:
        held.append(frame)
        if len(held) > settings.trim_tail_frames:
            yield held.popleft()


def check_output(settings: OutputSettings, jobs: Sequence[Job] | None) -> None:
    """Raise InputError if results cannot be written or would overwrite each other; `jobs` is None if not known yet."""
    check_target(settings, 2 if jobs is None else len(jobs))
    for job in jobs or ():
        check_length(settings, job.request.frames)
        check_names(settings, stem_of(settings, job, several=len(jobs or ()) > 1))


def check_names(settings: OutputSettings, stem: Path, *, sampled: bool = True) -> None:
    """Raise InputError for a stem whose files the file system rejects; `sampled` latents are written first."""
    files = [_NAMED_BY[write](stem) for write in _WRITERS[settings.output_type]]
    if sampled and not writes_latents(settings):
        files.append(pending_path(stem))
    for file in files:
        check_name(file, "give a shorter --save_path")


def check_target(settings: OutputSettings, count: int) -> None:
    """Raise InputError for a `--save_path` that cannot hold `count` results."""
    given, flag, suffix = settings.target, settings.target_flag, Path(settings.target).suffix.lower()
    _check_pattern(settings)
    if settings.codec == "lossless" and settings.video_quality is not None:
        raise InputError(
            f"--video_quality {settings.video_quality}: it has no effect with --codec lossless; leave out one of them"
        )
    if not given:
        raise InputError("--save_path is missing: give a .mp4 file or a folder")
    if unknown := [name for name in re.findall(r"\{[^{}]*\}", given) if name not in _NAMES]:
        raise InputError(f"{flag} {given}: unknown placeholder {unknown[0]}; use {' or '.join(_NAMES)}")
    if suffix in _OTHER_SUFFIXES:
        raise InputError(f"{flag} {given}: {suffix} is not supported; use .mp4, .png or a folder")
    if suffix in _FILE_SUFFIXES:
        if settings.output_type not in _FILE_SUFFIXES[suffix]:
            raise InputError(
                f"{flag} {given} does not match --output_type {settings.output_type}: {suffix} is for "
                f"{' and '.join(_FILE_SUFFIXES[suffix])}"
            )
        if count > 1 and "{index}" not in given:
            raise InputError(f"{flag} {given} names one file for several videos: add {{index}} to it, or give a folder")
    path = Path(given)
    check_names(settings, named_stem(settings, seed="0", index=0), sampled=False)
    if is_file(settings) and path.is_dir():
        raise InputError(f"{flag} {given} is an existing folder: give another file name")
    # Folders with {seed} or {index} are created later.
    folders = [*reversed(path.parents), *([] if is_file(settings) else [path])]
    check_writable([folder for folder in folders if "{" not in str(folder)][-1])


def _check_pattern(settings: OutputSettings) -> None:
    """Raise InputError for an `--output_pattern` that is not a file name, or with a `--save_path` that is one."""
    pattern, folder = settings.output_pattern, settings.save_path
    if pattern is None:
        return
    if Path(pattern).name != pattern or Path(pattern).suffix.lower() not in (*_FILE_SUFFIXES, *_OTHER_SUFFIXES):
        raise InputError(
            f"--output_pattern {pattern} is not a file name: give one that ends in {', '.join(_FILE_SUFFIXES)}, and its"
            " folder as --save_path"
        )
    if Path(folder).suffix.lower() in _FILE_SUFFIXES:
        raise InputError(
            f"--output_pattern {pattern} and --save_path {folder} both name a file: give a folder as --save_path, or"
            " leave out one of them"
        )


def check_length(settings: OutputSettings, frames: int) -> None:
    """Raise InputError if trimming leaves no frames, or several for a `--save_path` that is an image file."""
    left = frames - settings.trim_tail_frames
    if left < 1:
        raise InputError(
            f"--trim_tail_frames {settings.trim_tail_frames} must be less than the number of frames, {frames}"
        )
    if Path(settings.target).suffix.lower() == ".png" and left > 1:
        raise InputError(
            f"{settings.target_flag} {settings.target} is an image file, not one for {left} frames: use .mp4 or a"
            " folder"
        )


def writes_latents(settings: OutputSettings) -> bool:
    """Whether `--output_type` includes a latent file."""
    return _write_latent in _WRITERS[settings.output_type]


def write_outputs(product: Product) -> list[Path]:
    """Write the files of `--output_type` and return their paths."""
    return [write(product) for write in _WRITERS[product.settings.output_type]]


def latent_path(stem: Path) -> Path:
    """Return the path of a job's latent file."""
    return stem.with_name(f"{stem.name}{_LATENT}.safetensors")


def pending_path(stem: Path) -> Path:
    """Return the path of temporary latents, which are deleted after the frames are written."""
    return latent_path(stem.with_name(f"{stem.name}_pending"))


def save_latents(path: Path, latents: Tensor, comment: str, metadata: Mapping[str, str]) -> Path:
    """Write latents with their metadata, or without any if the record is empty."""
    save_tensors(path, {"latent": latents}, {**metadata, KEY: comment} if comment else {})
    return path


def latent_metadata(request: SampleRequest) -> dict[str, str]:
    """Return the metadata of latent files that other tools also write, under their names."""
    return {
        "seeds": str(request.seed),
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "height": str(request.height),
        "width": str(request.width),
        "video_length": str(request.frames),
        "infer_steps": str(request.steps),
        "guidance_scale": str(request.guidance),
    }


def _write_video(product: Product) -> Path:
    assert product.frames is not None
    remaining = iter(product.frames)
    first = list(itertools.islice(remaining, 2))
    if len(first) == 1 and Path(product.settings.target).suffix.lower() != ".mp4":
        image = product.stem.with_name(product.stem.name + ".png")
        write_image(image, first[0], comment=product.comment)
        return image
    video = product.stem.with_name(product.stem.name + ".mp4")
    codec, quality = product.settings.codec, product.settings.video_quality
    frames = itertools.chain(first, remaining)
    write_video(video, frames, fps=product.fps, codec=codec, quality=quality, comment=product.comment)
    return video


def _write_images(product: Product) -> Path:
    assert product.frames is not None
    write_images(product.stem, product.frames, comment=product.comment)
    return product.stem


def _write_latent(product: Product) -> Path:
    return save_latents(latent_path(product.stem), product.latents, product.comment, product.metadata)


# The longest file name of each writer.
_NAMED_BY: dict[Callable[[Product], Path], Callable[[Path], Path]] = {
    _write_video: lambda stem: stem.with_name(f"{stem.name}.mp4"),
    _write_images: lambda stem: stem / f"{stem.name}_0000.png",
    _write_latent: latent_path,
}
_WRITERS: dict[str, tuple[Callable[[Product], Path], ...]] = {
    "video": (_write_video,),
    "images": (_write_images,),
    "latent": (_write_latent,),
    # The latent first, because it takes longest to generate again if writing the video fails.
    "both": (_write_latent, _write_video),
    "latent_images": (_write_latent, _write_images),
}
