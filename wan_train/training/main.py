"""Run training from its settings: check everything, build the parts in order, and train."""

from pathlib import Path

from accelerate.utils import set_seed

from dataset.caching.remains import remove_remains
from wan_train.compile import log_cache_use
from wan_train.config_file import configuration_text
from wan_train.flow.boundaries import describe_boundary
from wan_train.log import get_logger
from wan_train.models.dit.experts import read_boundary
from wan_train.models.variants import VARIANTS
from wan_train.remote.addresses import shown
from wan_train.storage import replacing
from wan_train.training.accelerator import agree_on_seed, make_accelerator
from wan_train.training.build import build
from wan_train.training.experts.pair import saved_parts
from wan_train.training.experts.plan import with_named_experts
from wan_train.training.loop import train
from wan_train.training.needs import check_needs
from wan_train.training.objective.show_timesteps import show_timesteps
from wan_train.training.preflight import open_data, preflight
from wan_train.training.reporting.audit import audit
from wan_train.training.saving.checkpoints import path_of
from wan_train.training.saving.identity import identity_path, write_identity
from wan_train.training.saving.remote_output import open_mirror, with_local_output
from wan_train.training.saving.resume import chosen_seed
from wan_train.training.saving.save import final_path
from wan_train.training.settings import TrainSettings

log = get_logger(__name__)


def main(settings: TrainSettings) -> None:
    """Train as the settings say. Raise InputError, before a model is loaded, for settings that cannot work."""
    asked = with_named_experts(settings)
    settings, remote = with_local_output(asked)
    if settings.timesteps.show_timesteps:
        print(show_timesteps(settings))
        return
    if settings.experts.audit_timesteps:
        print(audit(settings))
        return
    if settings.experts.convert_boundary:
        print(
            describe_boundary(
                read_boundary(settings.experts.timestep_boundary, VARIANTS[settings.dit.task], "--convert_boundary")
            )
        )
        return
    plan = preflight(settings, remote)
    data = open_data(settings, plan.configs)
    check_needs(settings, plan.experts, data.training)
    accelerator = make_accelerator(settings.loop, settings.processes)
    seed = agree_on_seed(chosen_seed(settings.loop.seed, plan.state))
    set_seed(seed % 2**32)
    mirror = open_mirror(settings, remote) if remote is not None and accelerator.is_main_process else None
    run = build(settings, plan, data, accelerator, seed, mirror=mirror)
    if accelerator.is_main_process:
        remove_remains(Path(settings.save.output_dir))  # of a run that was killed while writing
        write_identity(settings.save, run.saving.identity)
        configuration = path_of(settings.save, "", ".config.toml")
        write_configuration(asked, configuration, seed=seed, mixed_precision=accelerator.mixed_precision)
        if mirror is not None:
            log.info("writing to %s, uploading to %s", mirror.local, shown(mirror.remote.url))
            mirror.upload(identity_path(settings.save))
            mirror.upload(configuration)
    length, processes = run.data.length, accelerator.num_processes
    log.info("%d steps, %d epochs, %d process(es) on %s", length.steps, length.epochs, processes, accelerator.device)
    try:
        train(run)
    finally:
        if run.reporting.writer is not None:
            run.reporting.writer.close()
        if run.saving.hub is not None:
            run.saving.hub.finish()
        if mirror is not None:
            mirror.finish()
    if accelerator.is_main_process:
        log_cache_use(settings.compile)
        files = [str(final_path(settings, name, part)) for name, _, part in saved_parts(run.model.adapter)]
        log.info("done: %s", " and ".join(files))
    accelerator.end_training()


def write_configuration(settings: TrainSettings, path: Path, *, seed: int, mixed_precision: str) -> None:
    """Write a `--config_file` that reproduces this run, with the drawn seed and the launcher's precision."""
    with replacing(path) as temporary:
        text = configuration_text(settings, seed=seed, mixed_precision=mixed_precision)
        temporary.write_text(text, encoding="utf-8")
