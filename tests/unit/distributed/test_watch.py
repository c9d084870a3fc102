"""Several processes end together, whichever of them fails; see `ended.py` for what each does."""

import pytest

from tests import processes


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("kind", "code", "reason"), [("input", 2, "only here"), ("error", 1, "out of memory")])
def test_one_that_fails_speaks_for_all(rank: int, kind: str, code: int, reason: str) -> None:
    started = processes.start("tests/unit/distributed/ended.py", rank, kind, ranks=3)
    _, err = started.communicate(60)
    assert [process.exitcode for process in started.processes] == [code] * 3, err
    assert [line for line in err.splitlines() if line.startswith("error")] == [f"error: {reason}"]


@pytest.mark.parametrize("rank", [0, 1])
def test_those_that_are_done_wait_for_the_last(rank: int) -> None:
    started = processes.start("tests/unit/distributed/ended.py", rank, "late", ranks=3)
    out, err = started.communicate(60)
    assert [process.exitcode for process in started.processes] == [0] * 3, err
    assert out == err == ""
