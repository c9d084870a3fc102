"""The simulated device sees each fault that it is there for, and nothing where there is none."""

import pytest

from tests.device.conftest import Bench
from tests.device.probes import PROBES


@pytest.mark.parametrize("name", PROBES)
def test_a_planted_fault_is_seen(bench: Bench, name: str) -> None:
    seen = bench.probe(name)
    expected = PROBES[name].expected
    if expected:
        assert len(seen) == 1 and expected in seen[0]
    else:
        assert seen == []
