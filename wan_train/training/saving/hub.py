"""Upload saved files to the Hugging Face Hub. Its client is imported only if an option requires it."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.remote.uploads import Uploads
from wan_train.training.reporting.settings import HUB_REPOSITORIES, HubSettings

log = get_logger(__name__)


class Client(Protocol):
    """The methods of `huggingface_hub.HfApi` that are used."""

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> Any:
        """Create a repository unless it exists."""
        ...

    def upload_file(self, *, path_or_fileobj: str, path_in_repo: str, repo_id: str, repo_type: str) -> Any:
        """Upload one file."""
        ...

    def upload_folder(self, *, folder_path: str, path_in_repo: str, repo_id: str, repo_type: str) -> Any:
        """Upload all files of a folder."""
        ...

    def snapshot_download(self, repo_id: str, *, repo_type: str, revision: str, allow_patterns: str) -> str:
        """Download the matching files of a revision; return the local folder of the snapshot."""
        ...


class Hub:
    """The repository that files are uploaded to. A failed upload is logged as a warning, and the run continues."""

    def __init__(self, settings: HubSettings, client: Client, *, background: bool = False) -> None:
        assert settings.huggingface_repo_id is not None
        self._settings, self._client, self._repo = settings, client, settings.huggingface_repo_id
        self._uploads = Uploads(background=background or settings.async_upload)

    def upload(self, path: Path) -> None:
        """Upload a saved file, or a state folder with `--save_state_to_huggingface`; in the background if requested."""
        if path.is_dir() and not self._settings.save_state_to_huggingface:
            return
        self._uploads.add(partial(self._upload, path))

    def finish(self) -> None:
        """Wait for all uploads in progress."""
        self._uploads.finish()

    def _upload(self, path: Path) -> None:
        if not path.exists():  # uploads may be slower than --save_last_n_... keeps files
            log.warning("%s was removed before it was uploaded to %s", path, self._repo)
            return
        place = {
            "path_in_repo": "/".join(
                part for part in (self._settings.huggingface_path_in_repo.strip("/"), path.name) if part
            ),
            "repo_id": self._repo,
            "repo_type": self._settings.huggingface_repo_type,
        }
        try:
            if path.is_dir():
                self._client.upload_folder(folder_path=str(path), **place)
            else:
                self._client.upload_file(path_or_fileobj=str(path), **place)
        except Exception as problem:  # anything that the client, the network or the hub raises
            log.warning(
                "%s could not be uploaded to %s, the local file is kept: %s", path, self._repo, _first_line(problem)
            )
            return
        log.info("uploaded %s to %s", path.name, self._repo)


def open_hub(settings: HubSettings, *, background: bool = False) -> Hub | None:
    """Return the repository, created if needed; None if none is given. Raise InputError if the hub refuses.

    With `background` or `--async_upload`, uploads are only waited for in `Hub.finish`.
    """
    if settings.huggingface_repo_id is None:
        return None
    client = make_client(settings.huggingface_token)
    try:
        client.create_repo(
            settings.huggingface_repo_id,
            repo_type=settings.huggingface_repo_type,
            private=settings.huggingface_repo_visibility == "private",
            exist_ok=True,
        )
    except Exception as problem:
        raise InputError(
            f"--huggingface_repo_id {settings.huggingface_repo_id} cannot be used: {_first_line(problem)}; "
            "check the name and the token, or omit it and upload later"
        ) from None
    return Hub(settings, client, background=background)


def check_hub(settings: HubSettings, resume: str | None) -> None:
    """Raise InputError for options that conflict, without contacting the hub."""
    repository = settings.huggingface_repo_id
    if repository is None:
        for flag in ("save_state_to_huggingface", "async_upload"):
            if getattr(settings, flag):
                raise InputError(f"--{flag} needs --huggingface_repo_id OWNER/NAME")
    elif len(repository.split("/")) != 2 or not all(repository.split("/")):
        raise InputError(f"--huggingface_repo_id {repository!r} is not OWNER/NAME")
    if settings.resume_from_huggingface:
        if resume is None:
            raise InputError("--resume_from_huggingface needs --resume REPO_ID/PATH_IN_REPO:REVISION:REPO_TYPE")
        parse_hub_path(resume)


@dataclass(frozen=True)
class HubFolder:
    """A folder in a repository on the hub."""

    repo_id: str
    folder: str
    revision: str
    repo_type: str


def parse_hub_path(text: str) -> HubFolder:
    """Parse `OWNER/NAME/FOLDER:REVISION:TYPE`; the defaults of the last two are main and model. Raise InputError for
    anything else."""
    path, _, rest = text.partition(":")
    revision, _, kind = rest.partition(":")
    parts = path.strip("/").split("/")
    if len(parts) < 3 or not all(parts) or (kind or "model") not in HUB_REPOSITORIES:
        raise InputError(
            f"--resume {text!r} is not a hub path: write OWNER/NAME/FOLDER:REVISION:TYPE, the type one of "
            f"{', '.join(HUB_REPOSITORIES)}"
        )
    return HubFolder("/".join(parts[:2]), "/".join(parts[2:]), revision or "main", kind or "model")


def fetch_state(address: str, token: str | None) -> Path:
    """Download a state folder from the hub and return its local path. Raise InputError if that fails."""
    wanted = parse_hub_path(address)
    try:
        copy = make_client(token).snapshot_download(
            wanted.repo_id,
            repo_type=wanted.repo_type,
            revision=wanted.revision,
            allow_patterns=f"{wanted.folder}/*",
        )
    except Exception as problem:
        raise InputError(f"--resume {address} cannot be downloaded: {_first_line(problem)}") from None
    folder = Path(copy) / wanted.folder
    if not folder.is_dir():
        raise InputError(f"--resume {address}: {wanted.repo_id} has no folder {wanted.folder} at {wanted.revision}")
    return folder


def make_client(token: str | None) -> Client:
    """Create the real client."""
    from huggingface_hub import HfApi

    client: Client = HfApi(token=token)
    return client


def _first_line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0] or type(problem).__name__
