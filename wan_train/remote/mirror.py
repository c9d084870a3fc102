"""Copy the files of a local folder to a remote one in the background."""

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path

from wan_train.log import get_logger
from wan_train.packages import first_line
from wan_train.remote.addresses import joined, shown
from wan_train.remote.folder import RemoteFolder
from wan_train.remote.uploads import WAITS, Uploads, retried

log = get_logger(__name__)


class Mirror:
    """Copies files of the folder `local` to the same names in `remote`; a failed copy logs one warning.

    `keeps_local`: whether local files are kept after upload. `last`: files without which a folder is incomplete, as in
    `RemoteFolder`. `growing`: files, and folders of files, that are written continuously, such as logs. `failed`: the
    paths that could not be uploaded, complete after `finish`.
    """

    def __init__(
        self,
        local: Path,
        remote: RemoteFolder,
        *,
        keeps_local: bool = True,
        last: Collection[str] = (),
        growing: Sequence[Path] = (),
    ) -> None:
        self.local, self.remote, self.failed = local, remote, list[Path]()
        self._keeps_local, self._last, self._growing = keeps_local, tuple(last), tuple(growing)
        self._uploads = Uploads(background=True)

    def upload(self, path: Path) -> None:
        """Queue the upload of a file or folder."""
        self._uploads.add(partial(self._upload, path))

    def upload_growing(self) -> None:
        """Queue the upload of the growing files, as they are at that time."""
        self._uploads.add(self._upload_growing)

    def remove(self, paths: Iterable[Path]) -> None:
        """Queue the removal of the copies of files and folders that were removed locally."""
        for path in paths:
            self._uploads.add(partial(self._remove, path))

    def finish(self) -> None:
        """Upload the growing files a last time and wait for all uploads."""
        self.upload_growing()
        self._uploads.finish()

    def name_of(self, path: Path) -> str:
        """Return the name of a local path in the remote folder."""
        return path.relative_to(self.local).as_posix()

    def _upload(self, path: Path) -> None:
        if not path.exists():  # removed by --save_last_n_... before its upload
            log.info("%s was removed before it was uploaded", path)
            return
        name = self.name_of(path)
        if not self._tried(path, lambda: self.remote.put(path, name, last=self._last)):
            return
        log.info("uploaded %s", shown(joined(self.remote.url, name)))
        if not self._keeps_local:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _upload_growing(self) -> None:
        files = [file for path in self._growing for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        for file in (file for file in files if file.is_file()):
            # A file that grows while it is read would not match the announced size.
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(shutil.copyfile(file, Path(folder) / file.name))
                self._tried(file, partial(self.remote.put, copy, self.name_of(file)))

    def _remove(self, path: Path) -> None:
        name = self.name_of(path)
        try:
            retried(lambda: self.remote.remove(name, last=self._last))
        except Exception as problem:
            log.warning("%s was not removed: %s", shown(joined(self.remote.url, name)), first_line(problem))

    def _tried(self, path: Path, put: Callable[[], None]) -> bool:
        """Return whether an upload succeeded within three attempts; if not, warn once per path."""
        try:
            retried(put)
        except Exception as problem:  # any error of the filesystem or the network
            if path.exists() and path not in self.failed:
                self.failed.append(path)
                log.warning(
                    "%s could not be uploaded to %s after %d attempts, the local copy is kept: %s",
                    *(path, shown(self.remote.url), len(WAITS) + 1, first_line(problem)),
                )
            return False
        if path in self.failed:
            self.failed.remove(path)
        return True
