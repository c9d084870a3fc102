"""Cache profiles: measured errors of reusing residuals, in a JSON file with an entry per run configuration."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.dit.experts import experts_of
from wan_train.sampling.request import SampleRequest
from wan_train.sampling.step_cache.settings import ATTENTION, AUTO, CALIBRATE, COMPILED, MAGCACHE, PROFILED
from wan_train.storage import replacing

log = get_logger(__name__)

FORMAT, VERSION = "wan-train step cache profile", 1
PATCH = 4  # latent cells per token


@dataclass(frozen=True)
class ReuseError:
    """The error of reusing, at `step`, the residual of `age` steps before, relative to the final latents.

    With `gap` 0 the residual is constant; otherwise it is extrapolated from that step and the one `gap` before it.
    """

    step: int
    age: int
    gap: int
    error: float


@dataclass(frozen=True)
class Entry:
    """The measurements of a run configuration.

    `settings` and `models` identify the configuration and the weight files; `num_passes` is by step; `ratios` are
    MagCache's ratios of residual norms, by pass and step; `scale` is the factor by which real errors exceed the sum of
    `errors`.
    """

    settings: Mapping[str, str]
    models: Mapping[str, str]
    num_passes: Sequence[int]
    errors: Sequence[ReuseError]
    ratios: Mapping[str, Mapping[int, float]]
    scale: float = 1.0
    num_videos: int = 1

    def differences(self, request: SampleRequest) -> dict[str, str]:
        """Return how the settings of this entry and a request differ: "euler in the profile, unipc in this run"."""
        wanted = run_settings(request)
        return {
            name: f"{self.settings.get(name, 'not set')} in the profile, {wanted.get(name, 'not set')} in this run"
            for name in {**wanted, **self.settings}
            if self.settings.get(name) != wanted.get(name)
        }


@dataclass(frozen=True)
class Profile:
    """The entries of a file."""

    entries: Sequence[Entry] = field(default_factory=tuple)

    def with_entry(self, entry: Entry) -> "Profile":
        """Return the profile with an entry added, or replaced if there is one for the same settings."""
        return Profile((*(old for old in self.entries if old.settings != entry.settings), entry))

    def nearest(self, request: SampleRequest) -> Entry | None:
        """Return the entry with the fewest differences from a request; the newest of equal ones."""
        return min(reversed(self.entries), key=lambda entry: len(entry.differences(request)), default=None)


def run_settings(request: SampleRequest) -> dict[str, str]:
    """Return the settings that errors depend on, by option: steps, guidance of each model, controls, and the number of
    tokens rounded to a power of two."""
    tokens = max(1, math.prod(request.latent_shape[1:]) // PATCH)
    guidances = [request.guided(expert) for expert in experts_of(request.variant)]
    settings = {
        "task": request.variant.name,
        "sample_solver": request.solver,
        "infer_steps": str(request.steps),
        "flow_shift": f"{request.noise_shift:g}",
        "timesteps": ",".join(f"{level:g}" for level in request.timesteps) or "even",
        "denoising_strength": f"{request.denoising_strength:g}" if request.video_path else "1",
        "video_size and video_length": f"about {2 ** round_log2(tokens)} tokens",
        "guidance_scale": " and ".join(f"{guidance.scale:g}" for guidance in guidances),
    }
    guidance = guidances[0]
    if guidance.skip_mode != "none":
        settings["cfg_skip_mode"] = f"{guidance.skip_mode} {guidance.ratio:g}"
    if guidance.slg_layers:
        layers = ",".join(map(str, guidance.slg_layers))
        settings["slg_layers"] = (
            f"{layers} {guidance.slg_mode} {guidance.slg_scale:g} {guidance.slg_start:g} {guidance.slg_end:g}"
        )
    if (request.control_start, request.control_end) != (0, 1):  # residuals change where a control begins or ends
        settings["control_start and control_end"] = f"{request.control_start:g} to {request.control_end:g}"
    if request.vace_scale != 1:
        settings["vace_scale"] = f"{request.vace_scale:g}"
    if request.sliding_window_size is not None:
        settings["sliding_window_size"] = f"{request.sliding_window_size} every {request.window_stride}"
    if request.riflex:
        settings["riflex_freq_index"] = str(request.riflex_freq_index)
    if request.variant.experts is not None:
        settings["timestep_boundary"] = f"{request.expert_boundary:g}"
    return settings | ({"cfg_merge": "on"} if guidance.merge else {})


def round_log2(number: int) -> int:
    """Return the power of two nearest to a number on a logarithmic scale."""
    return (number * number).bit_length() // 2


def check_cache(request: SampleRequest, *, is_compiled: bool = False, models: Mapping[str, str] | None = None) -> None:
    """Raise InputError for a step cache whose profile does not match, or that does not work with compiled blocks.

    `models` identify the weight files by option: a mismatch with the profile is a warning.
    """
    if request.step_cache == ATTENTION and is_compiled:
        raise InputError(COMPILED)
    if request.step_cache not in PROFILED:
        return
    assert request.cache_profile is not None
    path = request.cache_profile
    if request.step_cache == MAGCACHE:
        ratios_for(path, request)
    entry = entry_for(path, request) if request.step_cache == AUTO else _nearest(path, request)
    for name in () if models is None else models.keys() | entry.models.keys():
        if models is not None and models.get(name) != entry.models.get(name):
            log.warning("--cache_profile %s was measured with a different --%s: the errors may differ", path, name)


def entry_for(path: str, request: SampleRequest) -> Entry:
    """Return the entry that `--step_cache auto` needs for a request.

    Raises InputError for a file that is missing, damaged, of a newer version, or without an entry for these settings;
    the message names the difference from the nearest entry.
    """
    entry = _nearest(path, request)
    if different := entry.differences(request):
        name, values = next(iter(different.items()))
        raise InputError(
            f"--cache_profile {path} was measured with another --{name} ({values}): {CALIBRATE} for it, or use another"
            " --step_cache"
        )
    return entry


def ratios_for(path: str, request: SampleRequest) -> dict[str, dict[int, float]]:
    """Return MagCache's ratios for a request, by pass and step.

    Ratios for another number of steps are mapped to the nearest step, as in MagCache. Raises InputError like
    `entry_for`, but settings other than the task may differ, with a warning.
    """
    entry = _nearest(path, request)
    different = entry.differences(request)
    if "task" in different:
        raise InputError(
            f"--cache_profile {path} was measured with another --task ({different['task']}): {CALIBRATE} for it"
        )
    for name, values in different.items():
        if name != "infer_steps":
            log.warning(
                "--cache_profile %s was measured with another --%s (%s): the ratios may not fit", path, name, values
            )
            break
    measured, wanted = len(entry.num_passes), request.steps
    nearest = {step: round(step * (measured - 1) / max(1, wanted - 1)) for step in range(wanted)}
    return {
        name: {step: ratios[other] for step, other in nearest.items() if other in ratios}
        for name, ratios in entry.ratios.items()
    }


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """Read a profile. Raises InputError for a file that is missing, is not a profile, or has a newer version."""
    if Path(path).exists() and not Path(path).is_file():  # reading a device may never end
        raise InputError(f"--cache_profile {path} is not a regular file: {CALIBRATE}")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}")
        version = int(found["version"])
        entries = () if version > VERSION else tuple(map(_entry, found["entries"]))
    except OSError as problem:
        raise InputError(f"--cache_profile {path} cannot be read: {problem.strerror}; {CALIBRATE}") from None
    except KeyError as problem:
        raise InputError(f"--cache_profile {path} is not a profile ({problem} is missing): {CALIBRATE}") from None
    except (ValueError, TypeError, AttributeError) as problem:
        raise InputError(f"--cache_profile {path} is not a profile ({problem}): {CALIBRATE}") from None
    if version > VERSION:
        raise InputError(
            f"--cache_profile {path} has format version {version}, the newest supported is {VERSION}: update wan-train,"
            f" or calibrate again; {CALIBRATE}"
        )
    return Profile(entries)


def write_profile(path: str | os.PathLike[str], profile: Profile) -> None:
    """Write a profile atomically."""
    content = {"format": FORMAT, "version": VERSION, "entries": [_written(entry) for entry in profile.entries]}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def _nearest(path: str, request: SampleRequest) -> Entry:
    entry = read_profile(path).nearest(request)
    if entry is None:
        raise InputError(f"--cache_profile {path} has no entries: {CALIBRATE}")
    return entry


def _written(entry: Entry) -> dict[str, Any]:
    errors = [[row.step, row.age, row.gap, float(f"{row.error:.4g}")] for row in entry.errors]
    return {f.name: getattr(entry, f.name) for f in fields(entry)} | {"errors": errors}


def _entry(found: Mapping[str, Any]) -> Entry:
    known = {f.name: found[f.name] for f in fields(Entry)}
    errors = tuple(ReuseError(int(s), int(a), int(g), _measured(e)) for s, a, g, e in known["errors"])
    ratios = {str(name): {int(s): _measured(r) for s, r in rows.items()} for name, rows in known["ratios"].items()}
    settings, models = dict(known["settings"]), dict(known["models"])
    numbers = {"scale": _measured(known["scale"]), "num_videos": int(known["num_videos"])}
    num_passes = tuple(map(int, known["num_passes"]))
    if min(num_passes, default=0) < 1:
        raise ValueError(f"num_passes {list(num_passes)} are not at least 1 for each step")
    return Entry(settings, models, num_passes, errors, ratios, **numbers)  # type: ignore[arg-type]


def _measured(value: Any) -> float:
    """A norm, or a ratio of norms: with others a plan would keep no budget."""
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{number} is not a finite number of at least 0")
    return number
