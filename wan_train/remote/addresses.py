"""URLs of remote folders, and the local folders that mirror them."""

import hashlib
import os
import re
from pathlib import Path

from wan_train.errors import InputError

_PROTOCOL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_COLLAPSED = re.compile(
    r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE
)  # a URL after conversion to a Path; a drive has one letter
_PASSWORD = re.compile(r"(?<=://)([^/@:]*):[^/@]*@")
_MAX_SLUG = 80  # characters of an address in the name of its local folder


def is_remote(path: str) -> bool:
    """Return whether a path is a URL, such as `gs://bucket/folder`."""
    return _PROTOCOL.match(path) is not None


def protocol_of(url: str) -> str:
    """Return the part of a URL before `://`, in lower case."""
    match = _PROTOCOL.match(url)
    assert match is not None, url
    return match[1].lower()


def shown(url: str) -> str:
    """Return a URL for messages, with the password masked."""
    return _PASSWORD.sub(r"\1:***@", url)


def joined(url: str, name: str) -> str:
    """Return the URL of a file or folder in a folder."""
    return f"{url.rstrip('/')}/{name}"


def split(url: str) -> tuple[str, str]:
    """Split a URL into the URL of its parent folder and its own name."""
    folder, _, name = url.rstrip("/").rpartition("/")
    return folder, name


def local_folder(url: str, chosen: str | None = None) -> Path:
    """Return the local folder for a remote one: `chosen`, or a folder in the user's cache, the same for the same URL.

    That is `$XDG_CACHE_HOME/wan-train/remote/NAME`, by default under `~/.cache`: on disk, unlike some folders for
    temporary files.
    """
    if chosen is not None:
        return Path(chosen)
    plain = url.rstrip("/")
    slug = re.sub(r"[^\w.-]+", "_", shown(plain))[:_MAX_SLUG]
    digest = hashlib.sha256(plain.encode()).hexdigest()[:8]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "wan-train" / "remote" / f"{slug}-{digest}"


def check_local(path: str | os.PathLike[str]) -> None:
    """Raise InputError if a path is a URL."""
    text = os.fspath(path)
    if _COLLAPSED.match(text):
        url = re.sub(":/+", "://", text, count=1)
        raise InputError(
            f"cannot write to {shown(url)}: only --save_path and --output_dir take URLs; give a local path"
        )


def check_local_folder(option: str, path: str, chosen: str | None) -> None:
    """Raise InputError if `--local_output_dir` is a URL, or is given without a remote `path` of `option`."""
    if chosen is None:
        return
    if not is_remote(path):
        raise InputError(
            f"--local_output_dir {chosen} requires a remote {option} such as gs://bucket/folder, but {option} "
            f"{path or 'is not given'}{' is local' if path else ''}: omit it"
        )
    if is_remote(chosen):
        raise InputError(f"--local_output_dir {shown(chosen)} is a URL: give a local folder")
