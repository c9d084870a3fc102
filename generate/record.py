"""Generation records: the settings in a file's metadata, and generating it again from them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av

from generate.jobs import request_options
from generate.settings import GenerateSettings
from wan_train.config_file import changed_options, named_file, words_of
from wan_train.distributed.settings import ParallelSettings
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.media_out import read_comment
from wan_train.models.fingerprint import file_hash, fingerprint
from wan_train.packages import is_installed
from wan_train.sampling.control_settings import REPLACED
from wan_train.sampling.options import named_files
from wan_train.sampling.request import SampleRequest
from wan_train.sampling.settings import SamplingSettings
from wan_train.sampling.step_cache.schedule import Count
from wan_train.sampling.step_cache.settings import ATTENTION, SHORTCUT, replaced_by
from wan_train.storage import read_header
from wan_train.version import __version__

log = get_logger(__name__)

FLAG = "--from_metadata"
KEY = "wan_train"  # of the record in a latent file's metadata
_LATENT_ENDINGS = ("_pending_latent", "_latent")
_WEIGHTS = ("dit", "dit_high_noise", "motion_controller", "lora_weight", "lora_weight_high_noise")
# Options of where a video is generated, which do not affect the result.
_NOT_RECORDED = (
    "from_file",
    "interactive",
    "from_metadata",
    "save_path",
    "local_output_dir",
    "output_pattern",
    "compile_cache",
    "profile",
    "ckpt_dir",
    *(declared.name for declared in fields(ParallelSettings)),
    "text_cache",
    "device",
    "no_metadata",
    "strict_prompts",
)


@dataclass(frozen=True)
class Record:
    """The settings of a file: all options by name, and the hashes of the files that options name."""

    options: Mapping[str, Any]
    hashes: Mapping[str, Any]

    def text(self, count: Count | None = None) -> str:
        """Return the record as JSON, with the number of passes that a step cache computed and reused."""
        libraries = {name: version(name) for name in ("torch", "diffusers") if is_installed(name)}
        about = {"wan_train": __version__, "libraries": libraries}
        passes = {} if count is None else {"passes": {"computed": count.computed, "reused": count.reused}}
        return json.dumps(about | passes | {"options": self.options, "hashes": self.hashes}, ensure_ascii=False)


def model_hashes(settings: GenerateSettings) -> dict[str, Any]:
    """Return, by option, the fingerprint of each model and the SHA-256 of each LoRA."""
    models = {"dit": settings.dit.dit, "vae": settings.vae.vae, "t5": settings.text.t5, "clip": settings.image.clip}
    models |= {"dit_high_noise": settings.experts.dit_high_noise, "motion_controller": settings.dit.motion_controller}
    hashes: dict[str, Any] = {name: fingerprint(path) for name, path in models.items() if path}
    for name in ("lora_weight", "lora_weight_high_noise"):
        if paths := getattr(settings.lora, name):
            hashes[name] = [file_hash(path) for path in paths]
    return hashes


def weight_hashes(settings: GenerateSettings) -> dict[str, str]:
    """Return, by option, the identity of the weights that a profile is measured with, and LoRA multipliers."""
    hashes = {name: value for name, value in model_hashes(settings).items() if name in _WEIGHTS}
    for name in ("lora_multiplier", "lora_multiplier_high_noise"):
        if given := getattr(settings.lora, name):
            hashes[name] = given
    return {
        name: " ".join(f"{part}" for part in value) if isinstance(value, list | tuple) else value
        for name, value in hashes.items()
    }


def input_hashes(stated: SamplingSettings | SampleRequest, settings: type = SamplingSettings) -> dict[str, str]:
    """Return, by option of `settings`, the SHA-256 of input videos and images; folders have none."""
    return {
        name: " ".join(map(file_hash, paths))
        for name, paths in named_files(stated, settings).items()
        if all(Path(path).is_file() for path in paths)
    }


def make_record(settings: GenerateSettings, request: SampleRequest, hashes: Mapping[str, Any]) -> Record:
    """Return the record of one of the generated videos; `hashes` are those of the models."""
    # Sampling options come from the request, because a prompt line may override the command line.
    groups = [rows for group, rows in changed_options(settings).items() if group != "sampling"]
    about = {name: value for rows in groups for name, value in rows.items() if name not in _NOT_RECORDED}
    declared = type(settings.sampling)
    options = about | {"task": settings.dit.task} | request_options(request, declared)
    return Record(options, {**hashes, **input_hashes(request, declared)})


def read_record(path: str) -> Record:
    """Read the record of a video, an image, a folder of images or a latent file. Raises InputError without one."""
    try:
        text = read_header(path).metadata.get(KEY) if path.endswith(".safetensors") else read_comment(path)
    except (OSError, av.FFmpegError) as problem:
        raise InputError(f"{FLAG} {path} cannot be read: {getattr(problem, 'strerror', None) or problem}") from None
    try:
        found = json.loads(text or "")
        return Record(dict(found["options"]), dict(found["hashes"]))
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{FLAG} {path} has no generation settings: give a file that wan_generate_video.py wrote"
        ) from None


def with_recorded_options(argv: Sequence[str], alone: Mapping[str, bool]) -> list[str]:
    """Return the command line with the options of `--from_metadata` prepended, so that given options take precedence.

    The default `--save_path` is NAME_again next to the old file.
    """
    path = named_file(argv, FLAG)
    if not path:
        return list(argv)
    recorded = read_record(path).options
    replaced = {other for one, others in REPLACED.items() if named_file(argv, f"--{one}") for other in others}
    if cache := ATTENTION if SHORTCUT in argv else named_file(argv, "--step_cache"):
        replaced |= replaced_by(cache)
    kept = [(name, value) for name, value in recorded.items() if name not in replaced]
    words = words_of(kept, alone, f"{FLAG} {path}")
    output_type = named_file(argv, "--output_type") or recorded.get("output_type", "video")
    target = [] if named_file(argv, "--output_pattern") else [f"--save_path={_again(Path(path), output_type)}"]
    return [*words, *target, *argv]


def _again(old: Path, output_type: str) -> Path:
    """Return the default `--save_path` for regenerating a file or folder of images."""
    old = old if old.name.strip(".") else old.resolve()
    suffix = ".png" if old.suffix.lower() == ".png" and output_type in ("video", "both") else ".mp4"
    return old.with_name(f"{plain_name(old)}_again{suffix}")


def plain_name(path: Path) -> str:
    """Return the name of a result without its suffix and latent ending."""
    if path.is_dir():
        return path.name
    return next((path.stem.removesuffix(end) for end in _LATENT_ENDINGS if path.stem.endswith(end)), path.stem)


def compare_hashes(path: str, now: Mapping[str, Any]) -> None:
    """Warn about every model or input that differs from the record."""
    for name, before in read_record(path).hashes.items():
        if now.get(name) != before:
            log.warning("--%s is not the file that %s was generated with: the result will differ", name, path)
