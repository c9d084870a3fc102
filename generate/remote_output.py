"""Remote `--save_path`: write results to a local folder and upload them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from generate.output import is_file
from generate.settings import GenerateSettings, OutputSettings
from wan_train.distributed.exchange import from_all
from wan_train.distributed.groups import Groups
from wan_train.errors import RunError
from wan_train.log import get_logger
from wan_train.remote.addresses import check_local_folder, is_remote, local_folder, shown
from wan_train.remote.folder import open_remote
from wan_train.remote.mirror import Mirror

log = get_logger(__name__)


def with_local_save_path(settings: GenerateSettings, groups: Groups) -> tuple[GenerateSettings, Mirror | None]:
    """Replace a remote `--save_path` by a local path; return the settings and the mirror that uploads the results.

    Uploaded results are deleted locally unless `--local_output_dir` is given. The mirror is None for a local path, and
    in processes that write nothing, all but the first of each group. Raises InputError for a URL that is not supported
    or not writable.
    """
    output = settings.output
    check_local_folder("--save_path", output.save_path, output.local_output_dir)
    if not is_remote(output.save_path):
        return settings, None
    if output.output_pattern:
        named = f"{output.save_path.rstrip('/')}/{output.output_pattern}"
        output = replace(output, save_path=named, output_pattern=None)
    url, inside = _split(output)
    local = local_folder(url, output.local_output_dir)
    settings = replace(settings, output=replace(output, save_path=str(local / inside) if inside else str(local)))
    if not groups.is_first:
        return settings, None
    remote = open_remote(url, "--save_path")
    remote.check_writable("--save_path")
    return settings, Mirror(local, remote, keeps_local=output.local_output_dir is not None)


@contextmanager
def uploading(mirror: Mirror | None, groups: Groups) -> Iterator[None]:
    """Wait for all uploads at the end of the context, on all processes.

    Raises RunError, on all of them, with the names of the files that failed to upload.
    """
    try:
        yield
    finally:
        if mirror is not None:
            mirror.finish()
    failed = from_all(
        groups.all, [] if mirror is None else [(shown(mirror.remote.url), path) for path in mirror.failed]
    )
    if files := [file for part in failed for file in part]:
        named = ", ".join(str(path) for _, path in files)
        raise RunError(f"{len(files)} result(s) could not be uploaded to {files[0][0]}: {named}")


def deliver(path: Path, mirror: Mirror | None) -> None:
    """Log the path of a result, and upload it if there is a mirror."""
    log.info("wrote %s", path)
    if mirror is not None:
        mirror.upload(path)


def _split(output: OutputSettings) -> tuple[str, str]:
    """Split `--save_path` into the URL of the common folder and the rest: a file, or parts with {seed} or {index}."""
    protocol, _, path = output.save_path.rstrip("/").partition("://")
    parts = path.split("/")
    end = len(parts) - 1 if is_file(output) else len(parts)
    above = next((count for count, part in enumerate(parts[:end]) if "{" in part), end)
    return f"{protocol}://{'/'.join(parts[:above])}", "/".join(parts[above:])
