"""What is remembered of media files."""

import dataclasses

from dataset.caching.manifest import Manifest
from dataset.reading import probes
from dataset.reading.info import MediaInfo
from dataset.reading.probes import recall_header
from tests.unit.dataset.drawing import draw_image


def test_what_earlier_readers_told_of_a_file_is_not_taken_for_what_it_is(tmp_path, monkeypatch):
    path = draw_image(tmp_path / "a.png", mode="RGBA")
    fields = " ".join(field.name for field in dataclasses.fields(MediaInfo))
    with Manifest(tmp_path / "cache") as manifest:
        manifest.note(f"media {fields}", path, dataclasses.asdict(MediaInfo(48, 64, 1, None)))
        found = recall_header(path, manifest)
        assert found is not None and (found.width, found.height, found.reading) == (64, 48, ("alpha",))
        monkeypatch.setattr(probes, "probe", None)  # and then it is known
        assert recall_header(path, manifest) == found
