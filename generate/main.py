"""The generator: check everything, then do what the command line asks for."""

import time

import torch

from generate.calibration import calibrate, calibration_jobs
from generate.interactive import converse
from generate.jobs import check_request, make_jobs
from generate.latents import check_latents, decode_latents
from generate.merged import check_merged, save_merged_model
from generate.models import Models
from generate.output import check_output
from generate.preflight import check_generation, check_given_vae, fitted_jobs
from generate.record import compare_hashes, input_hashes, model_hashes
from generate.remote_output import uploading, with_local_save_path
from generate.runs import OnDisk, run_jobs
from generate.settings import GenerateSettings
from wan_train.compile import tell_of_cache
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.variants import VARIANTS
from wan_train.placement.report import describe_peak
from wan_train.precision import default_device
from wan_train.remote.mirror import Mirror

log = get_logger(__name__)


def main(settings: GenerateSettings) -> None:
    """Do what the settings ask for. Raises InputError, before a model is loaded, for what cannot work."""
    began, device = time.monotonic(), default_device(settings.output.device)
    wanted = _wanted(settings)
    work = _WORK[wanted]
    if settings.profile.profile and work in (_decode, _merge):
        raise InputError(f"--profile traces sampling steps, and {wanted} takes none: leave out one of them")
    settings, mirror = with_local_save_path(settings)
    with uploading(mirror):
        work(settings, device, mirror)
    tell_of_cache(settings.compile)
    log.info("done in %.1f s; at most %s", time.monotonic() - began, describe_peak(device))


def _generate(settings: GenerateSettings, device: torch.device, mirror: Mirror | None) -> None:
    jobs = make_jobs(settings)
    loras = check_generation(settings, device, wants_frames=settings.output.output_type != "latent")
    jobs = fitted_jobs(jobs, settings)
    check_output(settings.output, jobs)
    hashes = _hashes(settings)
    delivery = OnDisk(settings, hashes, several=len(jobs) > 1, mirror=mirror)
    run_jobs(jobs, Models(settings, loras, device), delivery)


def _converse(settings: GenerateSettings, device: torch.device, mirror: Mirror | None) -> None:
    check_request(settings)
    loras = check_generation(settings, device, wants_frames=settings.output.output_type != "latent")
    check_output(settings.output, None)
    models = Models(settings, loras, device, keep=True)
    converse(models, OnDisk(settings, _hashes(settings), several=True, mirror=mirror))


def _calibrate(settings: GenerateSettings, device: torch.device, mirror: Mirror | None) -> None:
    jobs = calibration_jobs(settings)
    loras = check_generation(settings, device, wants_frames=False)
    jobs = fitted_jobs(jobs, settings)
    path = settings.sampling.cache_profile
    assert path is not None
    calibrate(jobs, Models(settings, loras, device), path)


def _decode(settings: GenerateSettings, device: torch.device, mirror: Mirror | None) -> None:
    check_given_vae(settings)
    files = check_latents(settings.batch.latent_path, settings.output, VARIANTS[settings.dit.task])
    decode_latents(files, Models(settings, {}, device), mirror)


def _merge(settings: GenerateSettings, device: torch.device, mirror: Mirror | None) -> None:
    path = settings.output.save_merged_model
    assert path is not None
    save_merged_model(settings, check_merged(settings, path), path)


def _hashes(settings: GenerateSettings) -> dict[str, object]:
    if settings.output.no_metadata:
        return {}
    hashes = model_hashes(settings)
    if settings.batch.from_metadata:
        compare_hashes(settings.batch.from_metadata, hashes | input_hashes(settings.sampling))
    return hashes


def _wanted(settings: GenerateSettings) -> str:
    """The one thing that the options ask for; InputError for two that exclude each other."""
    prompt = "--from_metadata" if settings.batch.from_metadata else "--prompt"
    asked = {
        prompt: bool(settings.sampling.prompt.strip()),
        "--from_file": settings.batch.from_file is not None,
        "--interactive": settings.batch.interactive,
        "--latent_path": bool(settings.batch.latent_path),
        "--save_merged_model": settings.output.save_merged_model is not None,
    }
    given = [flag for flag, there in asked.items() if there]
    if settings.calibration.calibrate_steps is not None:
        if other := [flag for flag in given if flag not in (prompt, "--from_file")]:
            raise InputError(f"--calibrate_steps and {other[0]} each say what to do: give one of them")
        return "--calibrate_steps"
    if len(given) > 1:
        raise InputError(f"{given[0]} and {given[1]} each say what to make: give one of them")
    return given[0] if given else "--prompt"


_WORK = {
    "--from_metadata": _generate,
    "--prompt": _generate,
    "--from_file": _generate,
    "--interactive": _converse,
    "--calibrate_steps": _calibrate,
    "--latent_path": _decode,
    "--save_merged_model": _merge,
}
