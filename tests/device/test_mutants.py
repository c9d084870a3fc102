"""Faults put into the product on purpose are seen, so that the cases can fail."""

import pytest

from tests.device.conftest import Bench
from tests.device.mutants import MUTANTS

ORDINARY = ("the host keeps the rope table", "the noise stays on the host")
NAMES = [pytest.param(name, marks=[] if name in ORDINARY else pytest.mark.slow) for name in MUTANTS]


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_is_seen(bench: Bench, name: str) -> None:
    mutant = MUTANTS[name]
    result = bench.result(mutant.case, name)
    seen = [*result.findings, *([result.error] if result.error else [])]
    assert any(mutant.seen in fault for fault in seen), seen or result.output
