"""The generator: check all options, then run the mode that they select."""

import logging
import time

from generate.calibration import calibrate, calibration_jobs
from generate.interactive import run_interactive
from generate.jobs import check_request, make_jobs
from generate.latents import check_latents, decode_latents
from generate.merged import check_merged, save_merged_model
from generate.models import Models
from generate.needs import check_needs
from generate.output import check_output
from generate.parallel import (
    NoOutput,
    agree_on,
    check_heads,
    check_parallel,
    check_shared_jobs,
    refuse_several,
    share_of,
)
from generate.preflight import check_generation, check_given_vae, fitted_jobs
from generate.record import compare_hashes, input_hashes, model_hashes
from generate.remote_output import uploading, with_local_save_path
from generate.runs import Delivery, OnDisk, run_jobs
from generate.settings import GenerateSettings
from wan_train.compile import log_cache_use
from wan_train.distributed.groups import Groups
from wan_train.distributed.watch import working_together
from wan_train.errors import InputError
from wan_train.log import get_logger, set_level
from wan_train.models.variants import VARIANTS
from wan_train.placement.report import describe_peak
from wan_train.precision import default_device
from wan_train.remote.mirror import Mirror

log = get_logger(__name__)


def main(settings: GenerateSettings) -> None:
    """Run the generator. Raises InputError for invalid settings before a model is loaded."""
    began = time.monotonic()
    mode = _mode(settings)
    if settings.profile.profile and _MODES[mode] in (_calibrate, _decode, _merge):
        raise InputError(f"--profile traces sampling, which {mode} does not do: leave out one of them")
    with working_together(settings.parallel, lambda: default_device(settings.output.device)) as groups:
        if groups.all.size > 1:
            set_level(logging.INFO if groups.is_first else logging.ERROR)  # the others would repeat the warnings
        settings, mirror = with_local_save_path(settings, groups)
        with uploading(mirror, groups):
            _MODES[mode](settings, groups, mirror)
    log_cache_use(settings.compile)
    log.info("done in %.1f s; peak %s", time.monotonic() - began, describe_peak(groups.device))


def _generate(settings: GenerateSettings, groups: Groups, mirror: Mirror | None) -> None:
    jobs = agree_on(make_jobs(settings), groups)
    check_parallel(settings)
    wants_frames = settings.output.output_type != "latent"
    loras = check_generation(settings, groups.device, wants_frames=wants_frames)
    check_heads(settings)
    jobs = fitted_jobs(jobs, settings)
    check_shared_jobs(settings, jobs)
    check_needs(jobs, settings, loras, groups.device, wants_frames=wants_frames)
    delivery: Delivery
    if groups.is_first:
        check_output(settings.output, jobs)
        delivery = OnDisk(settings, _hashes(settings), several=len(jobs) > 1, mirror=mirror)
    else:
        delivery = NoOutput(wants_frames=wants_frames and settings.parallel.vae_parallel)
    run_jobs(share_of(jobs, groups), Models(settings, loras, groups.device, groups=groups), delivery)


def _interactive(settings: GenerateSettings, groups: Groups, mirror: Mirror | None) -> None:
    refuse_several(groups, "--interactive", "prompts are read from one keyboard")
    check_request(settings)
    loras = check_generation(settings, groups.device, wants_frames=settings.output.output_type != "latent")
    check_output(settings.output, None)
    models = Models(settings, loras, groups.device, keep=True)
    run_interactive(models, OnDisk(settings, _hashes(settings), several=True, mirror=mirror))


def _calibrate(settings: GenerateSettings, groups: Groups, mirror: Mirror | None) -> None:
    refuse_several(groups, "--calibrate_steps", "errors are measured in one process")
    jobs = calibration_jobs(settings)
    loras = check_generation(settings, groups.device, wants_frames=False)
    jobs = fitted_jobs(jobs, settings)
    path = settings.sampling.cache_profile
    assert path is not None
    calibrate(jobs, Models(settings, loras, groups.device), path)


def _decode(settings: GenerateSettings, groups: Groups, mirror: Mirror | None) -> None:
    check_given_vae(settings)
    files = check_latents(settings.batch.latent_path, settings.output, VARIANTS[settings.dit.task])
    decode_latents(files, Models(settings, {}, groups.device, groups=groups), mirror)


def _merge(settings: GenerateSettings, groups: Groups, mirror: Mirror | None) -> None:
    refuse_several(groups, "--save_merged_model", "one process merges the tensors")
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


def _mode(settings: GenerateSettings) -> str:
    """Return the option that selects the mode. Raises InputError for two that exclude each other."""
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
            raise InputError(f"--calibrate_steps and {other[0]} exclude each other: give one of them")
        return "--calibrate_steps"
    if len(given) > 1:
        raise InputError(f"{given[0]} and {given[1]} exclude each other: give one of them")
    return given[0] if given else "--prompt"


_MODES = {
    "--from_metadata": _generate,
    "--prompt": _generate,
    "--from_file": _generate,
    "--interactive": _interactive,
    "--calibrate_steps": _calibrate,
    "--latent_path": _decode,
    "--save_merged_model": _merge,
}
