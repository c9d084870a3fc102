"""The counted costs of a pass and of training steps stay what they are.

`python benchmarks/roofline.py --record` stores counts that fell; those that rose are changed by hand, as a decision.
"""

import json
from pathlib import Path

import pytest

from benchmarks import roofline


@pytest.mark.parametrize("step_kind", roofline.KINDS)
def test_counts_are_as_stored(step_kind: str) -> None:
    stored = json.loads(roofline.STORED.read_text())[step_kind]
    assert roofline.stored_counts(step_kind) == pytest.approx(stored, rel=0.02)


def test_a_step_waits_for_the_loss_alone_and_copies_nothing_to_the_device() -> None:
    counts = roofline.count("ours", "recomputed", 1)
    assert (counts.copies, counts.waits) == (0, 1)


def test_recording_takes_over_falls_and_leaves_rises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"forward": {"kernels": 5, "copies": 1}}))
    monkeypatch.setattr(roofline, "KINDS", ("forward",))
    monkeypatch.setattr(roofline, "stored_counts", lambda step_kind: {"kernels": 4, "copies": 2, "waits": 0})
    roofline.record(path)
    assert json.loads(path.read_text()) == {"forward": {"kernels": 4, "copies": 1, "waits": 0}}
    assert "forward copies rose from 1 to 2" in capsys.readouterr().out
