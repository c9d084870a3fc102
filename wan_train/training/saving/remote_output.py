"""A remote `--output_dir`: its local folder, its mirror, and downloads for resuming."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from networks.moments import is_saved_as
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.packages import first_line
from wan_train.remote.addresses import check_local_folder, is_remote, local_folder, shown, split
from wan_train.remote.folder import RemoteFolder, open_remote
from wan_train.remote.mirror import Mirror
from wan_train.training.saving.checkpoints import STATE
from wan_train.training.saving.identity import identity_path
from wan_train.training.saving.settings import SaveSettings
from wan_train.training.saving.state import MANIFEST, NewerState, State, open_state, parse_state
from wan_train.training.settings import TrainSettings

log = get_logger(__name__)

_LOCK = ".fetching.lock"


def with_local_output(settings: TrainSettings) -> tuple[TrainSettings, RemoteFolder | None]:
    """Replace a remote `--output_dir` with its local folder in the settings, and return the remote folder too; nothing
    is transferred. Raise InputError for a URL that cannot be used."""
    save = settings.save
    check_local_folder("--output_dir", save.output_dir, save.local_output_dir)
    if not is_remote(save.output_dir):
        return settings, None
    remote = open_remote(save.output_dir, "--output_dir")
    local = local_folder(save.output_dir, save.local_output_dir)
    return replace(settings, save=replace(save, output_dir=str(local))), remote


def open_mirror(settings: TrainSettings, remote: RemoteFolder) -> Mirror:
    """Create the mirror that uploads the files of a run to its remote folder."""
    save = settings.save
    logs = [] if settings.logs.logging_dir is not None else [Path(save.output_dir) / "logs"]
    growing = [save.metrics_path, *logs]
    return Mirror(Path(save.output_dir), remote, last=(MANIFEST,), growing=growing)


@contextmanager
def fetching(remote: RemoteFolder, folder: Path) -> Iterator[None]:
    """Lock a local folder for downloading, one process per machine at a time. Failures raise InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / _LOCK):
            yield
    except InputError:
        raise
    except Exception as problem:  # anything that a filesystem or the network raises
        raise InputError(
            f"--resume: {shown(remote.url)} cannot be read ({type(problem).__name__}: {first_line(problem)}): check the"
            " folder and the credentials"
        ) from None


def remote_states(save: SaveSettings, remote: RemoteFolder) -> list[State]:
    """Return the complete states of this name in the remote folder, by reading only manifests; their folders are where
    they would be downloaded to. Raise NewerState for one of a later version."""
    whole = []
    for name in remote.names():
        if is_saved_as(name, save.output_name, STATE):
            try:
                whole.append(_read_state(remote, name, Path(save.output_dir) / name))
            except NewerState:
                raise
            except InputError:
                continue  # its upload was interrupted
    return whole


def with_remote(local: Sequence[State], remote: Sequence[State]) -> list[State]:
    """Merge local and remote states; of two with the same name, keep that of the later run, or with more steps."""
    by_name = {state.folder.name: state for state in local}
    for state in remote:
        own = by_name.get(state.folder.name)
        if own is None or _age(own) < _age(state):
            by_name[state.folder.name] = state
    return list(by_name.values())


def fetch_identity(save: SaveSettings, remote: RemoteFolder) -> None:
    """Download the record of the latest run of this name, if there is one."""
    path = identity_path(save)
    if remote.read(path.name) is not None:
        remote.fetch(path.name, path)


def fetch_state(remote: RemoteFolder, state: State) -> State:
    """Download a state of `remote_states` to its local folder."""
    log.info("downloading the state %s from %s", state.folder.name, shown(remote.url))
    remote.fetch_folder(state.folder.name, state.folder)
    return open_state(state.folder)


def fetch_metrics(save: SaveSettings, remote: RemoteFolder, *, anew: bool) -> None:
    """Download the metrics file if it does not exist here, or `anew`."""
    path = save.metrics_path
    if (anew or not path.is_file()) and remote.read(path.name) is not None:
        remote.fetch(path.name, path)


def fetch_named_state(url: str) -> Path:
    """Download the state at the URL of `--resume`, unless it is already here. Return its local folder, which is
    separate from those of runs. Raise InputError for a state that is missing or incomplete."""
    above, name = split(url)
    remote = open_remote(above, "--resume")
    folder = local_folder(above) / "states" / name
    with fetching(remote, folder.parent):
        text = remote.read(f"{name}/{MANIFEST}")
        if text is None:
            raise InputError(f"--resume {shown(url)} has no {MANIFEST}: give the URL of a complete state folder")
        here = folder / MANIFEST
        if not here.is_file() or here.read_bytes() != text:
            try:
                state = _read_state(remote, name, folder)
            except NewerState:
                raise
            except InputError:
                raise InputError(f"--resume {shown(url)} is incomplete: give the URL of another state") from None
            fetch_state(remote, state)
    return folder


def _read_state(remote: RemoteFolder, name: str, folder: Path) -> State:
    text = remote.read(f"{name}/{MANIFEST}")
    if text is None:
        raise InputError(f"{name} has no {MANIFEST}")
    sizes = remote.sizes(name)
    return parse_state(folder, lambda: text, lambda file: sizes.get(file, -1))


def _age(state: State) -> tuple[float, int]:
    return state.started_at, state.position.step
