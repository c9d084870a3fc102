"""Addresses of remote folders, and the local folders that stand for them."""

import hashlib
import os
import re
from pathlib import Path

from wan_train.errors import InputError

_PROTOCOL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_COLLAPSED = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # what a Path leaves of it; a drive has one letter
_PASSWORD = re.compile(r"(?<=://)([^/@:]*):[^/@]*@")
_MAX_SLUG = 80  # characters of an address in the name of its local folder


def is_remote(path: str) -> bool:
    """Tell whether a path is a URL, such as `gs://bucket/folder`."""
    return _PROTOCOL.match(path) is not None


def protocol_of(url: str) -> str:
    """Return the part of a URL before `://`, in lower case."""
    match = _PROTOCOL.match(url)
    assert match is not None, url
    return match[1].lower()


def shown(url: str) -> str:
    """Return a URL for messages, without the password that it may hold."""
    return _PASSWORD.sub(r"\1:***@", url)


def joined(url: str, name: str) -> str:
    """Return the URL of a file or folder in a folder."""
    return f"{url.rstrip('/')}/{name}"


def split(url: str) -> tuple[str, str]:
    """Return the URL of the folder that a URL is in, and its own name."""
    folder, _, name = url.rstrip("/").rpartition("/")
    return folder, name


def local_folder(url: str, chosen: str | None = None) -> Path:
    """Return the local folder of a remote one: `chosen`, or the same for the same URL in the user's cache folder.

    That is `$XDG_CACHE_HOME/wan-train/remote/NAME`, by default below `~/.cache`: on a disk, which a folder for
    temporary files may not be.
    """
    if chosen is not None:
        return Path(chosen)
    plain = url.rstrip("/")
    slug = re.sub(r"[^\w.-]+", "_", shown(plain))[:_MAX_SLUG]
    digest = hashlib.sha256(plain.encode()).hexdigest()[:8]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "wan-train" / "remote" / f"{slug}-{digest}"


def check_local(path: str | os.PathLike[str]) -> None:
    """Raise InputError for a URL in the place of a local path."""
    text = os.fspath(path)
    if _COLLAPSED.match(text):
        url = re.sub(":/+", "://", text, count=1)
        raise InputError(
            f"cannot write to {shown(url)}: only --save_path and --output_dir take URLs; give a local path"
        )


def check_local_folder(option: str, path: str, chosen: str | None) -> None:
    """Raise InputError for a `--local_output_dir` that is remote itself, or without a remote `path` of `option`."""
    if chosen is None:
        return
    if not is_remote(path):
        raise InputError(
            f"--local_output_dir {chosen} is for a remote {option} such as gs://bucket/folder, and {option} "
            f"{path or 'is not given'}{' is local' if path else ''}: leave it out"
        )
    if is_remote(chosen):
        raise InputError(f"--local_output_dir {shown(chosen)} is a URL: give a local folder")
