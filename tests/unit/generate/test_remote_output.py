"""Uploads of several groups of processes."""

from pathlib import Path

import pytest

import generate.remote_output
from generate.remote_output import uploading
from tests.filesystems import Flaky
from wan_train.distributed.groups import Groups
from wan_train.errors import RunError
from wan_train.remote.folder import open_remote
from wan_train.remote.mirror import Mirror


def test_a_failed_upload_is_told_by_all_once_all_have_finished(
    flaky: type[Flaky], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process would end the others, in the midst of their uploads."""
    there, remote = tmp_path / "there", open_remote(f"flaky://{tmp_path}/there", "--save_path")

    def also_others(_: object, own: list[object]) -> list[list[object]]:
        assert (there / "v.mp4").exists(), "asked before this process has uploaded its own"
        return [own, [("gs://bucket", Path("/cache/w.mp4"))]]

    monkeypatch.setattr(generate.remote_output, "from_all", also_others)
    (tmp_path / "v.mp4").write_bytes(b"video")
    mirror = Mirror(tmp_path, remote)
    with pytest.raises(RunError, match=r"1 result\(s\) could not be uploaded to gs://bucket: /cache/w.mp4"):
        with uploading(mirror, Groups()):
            mirror.upload(tmp_path / "v.mp4")
