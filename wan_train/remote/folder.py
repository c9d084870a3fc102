"""A remote folder accessed through fsspec; files and folders are uploaded atomically."""

import contextlib
import secrets
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_train.errors import InputError
from wan_train.file_names import PROBE, hidden_prefix
from wan_train.packages import first_line, missing
from wan_train.remote.addresses import protocol_of, shown
from wan_train.storage import replacing, replacing_folder

# The pip packages of protocols that fsspec does not implement itself.
PACKAGES = {
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("oci", "ocilake"), "ocifs"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    "oss": "ossfs",
    "hf": "huggingface_hub",
    "smb": "smbprotocol",
    "hdfs": "pyarrow",
}
# Protocols with atomic PUT or commit, for which moving an object copies it.
OBJECT_STORES = frozenset(("gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "adl", "oci", "oss", "hf"))


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at `root` of an fsspec filesystem; names are relative to it, with slashes.

    If the filesystem `renames`, uploads get a temporary name until they are complete. Otherwise objects are uploaded
    atomically; when a folder is replaced, the files named `last` are removed first and uploaded last, so that a folder
    without them is known to be incomplete.
    """

    url: str
    filesystem: Any
    root: str
    renames: bool

    def put(self, path: Path, name: str, *, last: Collection[str] = ()) -> None:
        """Copy a local file or folder to `name`, replacing it if it exists. Raises the filesystem's errors."""
        self._put_renamed(path, name) if self.renames else self._put_objects(path, name, last)

    def remove(self, name: str, *, last: Collection[str] = ()) -> None:
        """Remove a file, or a folder with its files named `last` first; does nothing if it does not exist."""
        target = self._at(name)
        self.filesystem.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            for each in last:
                self._remove_file(f"{target}/{each}")
            self.filesystem.rm(target, recursive=True)

    def names(self, under: str = "") -> list[str]:
        """Return the names of the entries of the folder, or of its subfolder `under`."""
        return sorted(self.sizes(under))

    def sizes(self, under: str = "") -> dict[str, int]:
        """Return the sizes in bytes, by name, of the entries of the folder, or of its subfolder `under`.

        Sizes of folders are meaningless. Empty if there is no such folder.
        """
        self.filesystem.invalidate_cache()
        try:
            found = self.filesystem.ls(self._at(under), detail=True)
        except FileNotFoundError:
            return {}
        named = {str(row["name"]).rstrip("/").rpartition("/")[2]: int(row.get("size") or 0) for row in found}
        # Some object stores list an empty object for the folder itself.
        return {name: size for name, size in named.items() if name}

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if it does not exist."""
        try:
            return bytes(self.filesystem.cat_file(self._at(name)))
        except FileNotFoundError:
            return None

    def fetch(self, name: str, target: Path) -> None:
        """Download a file to a local path atomically. Raises the filesystem's errors."""
        with replacing(target) as temporary:
            self.filesystem.get_file(self._at(name), str(temporary))

    def fetch_folder(self, name: str, target: Path) -> None:
        """Download a folder without subfolders to a local path atomically."""
        with replacing_folder(target) as temporary:
            for each in self.names(name):
                self.filesystem.get_file(self._at(f"{name}/{each}"), str(temporary / each))

    def check_writable(self, option: str) -> None:
        """Write and remove a small file. Raises InputError, naming the option, if that fails."""
        probe = f"{PROBE}-{secrets.token_hex(4)}"
        try:
            if self.renames:
                self.filesystem.makedirs(self.root, exist_ok=True)
            self.filesystem.pipe_file(self._at(probe), b"probe")
            self.filesystem.rm_file(self._at(probe))
        except Exception as problem:  # any error of the package, the network or the store
            raise InputError(
                f"{option} {shown(self.url)} cannot be written to ({type(problem).__name__}: {first_line(problem)}):"
                " check the bucket or folder and the credentials, or give a local folder"
            ) from None

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")

    def _put_renamed(self, path: Path, name: str) -> None:
        files, target = self.filesystem, self._at(name)
        parent = target.rpartition("/")[0]
        temporary = f"{parent}/{hidden_prefix(Path(name))}{secrets.token_hex(4)}"
        files.makedirs(parent, exist_ok=True)
        try:
            for file, inside in _files_of(path):
                destination = f"{temporary}{inside}"
                files.makedirs(destination.rpartition("/")[0], exist_ok=True)
                files.put_file(str(file), destination)
            if path.is_dir() and files.exists(target):
                files.rm(target, recursive=True)  # a folder cannot be renamed to an existing one
            files.mv(temporary, target)
        except BaseException:
            with contextlib.suppress(Exception):
                files.rm(temporary, recursive=True)
            raise

    def _put_objects(self, path: Path, name: str, last: Collection[str]) -> None:
        target, found = self._at(name), list(_files_of(path))
        if path.is_dir():
            for each in last:
                self._remove_file(f"{target}/{each}")
            kept = {inside.removeprefix("/") for _, inside in found}
            for each in set(self.names(name)) - kept:
                self._remove_file(f"{target}/{each}")
        for file, inside in sorted(found, key=lambda each: (each[0].name in last, each)):
            self.filesystem.put_file(str(file), f"{target}{inside}")

    def _remove_file(self, address: str) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self.filesystem.rm_file(address)


def open_remote(url: str, option: str) -> RemoteFolder:
    """Return the folder of a URL, without network access.

    Raises InputError, naming the option, for an unknown protocol, a missing package, or a URL that the filesystem does
    not accept.
    """
    # Slow imports that local runs do not need.
    from fsspec import AbstractFileSystem, available_protocols
    from fsspec.core import url_to_fs

    protocol = protocol_of(url)
    try:
        filesystem, root = url_to_fs(url)
    except ImportError as problem:
        package = PACKAGES.get(protocol, getattr(problem, "name", None) or protocol)
        raise InputError(missing(f"{option} {shown(url)}", package, instead="give a local folder")) from None
    except Exception as problem:
        known = available_protocols()
        reason = f"fsspec does not know {protocol}://" if protocol not in known else first_line(problem)
        raise InputError(
            f"{option} {shown(url)} cannot be opened ({reason}): give a URL like gs://bucket/folder or"
            " s3://bucket/folder, or a local folder"
        ) from None
    renames = protocol not in OBJECT_STORES and type(filesystem).mv is not AbstractFileSystem.mv
    return RemoteFolder(url, filesystem, str(root).rstrip("/"), renames)


def _files_of(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files of a folder with their relative paths, each starting with a slash; for a file itself an empty
    path."""
    if not path.is_dir():
        yield path, ""
        return
    for file in sorted(path.rglob("*")):
        if file.is_file():
            yield file, f"/{file.relative_to(path).as_posix()}"
