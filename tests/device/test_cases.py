"""Tools run on a simulated CUDA device as they do on the CPU: no fault, the same numbers, nothing left behind."""

import pytest

from tests.device.conftest import Bench
from tests.device.table import CASES, ORDINARY
from wan_train.training.settings import TOOL as TRAIN

NAMES = [pytest.param(name, marks=[] if name in ORDINARY else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", NAMES)
def test_a_case_is_right_on_a_device(bench: Bench, waits: dict[str, int], name: str) -> None:
    result, within = bench.result(name), CASES[name].within
    assert not result.code, result.error or result.output
    assert result.num_operators and result.peak, "nothing ran on the device"
    assert not result.findings
    assert not result.alive
    if within is not None:
        assert result.compared, "nothing was compared"
        assert result.difference <= within
    if CASES[name].tool is TRAIN:
        assert result.waits
        assert result.waits[-1] <= waits.get(name, waits["others"]), result.where_waited
