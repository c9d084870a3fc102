"""Run tests that are marked gpu on the simulated device: `pytest -p tests.device.plugin -m gpu`."""

import os
import sys
from collections.abc import Generator
from typing import Any

import pytest

from tests.device.simulated.hooks import install

install()  # before the first backward pass of the process

from tests.device.simulated.device import SimulatedCuda  # noqa: E402

# What needs a real GPU, by a part of the test's name, and why.
NEED_A_GPU = {
    "placement/test_offload.py::test_on_an_accelerator": "sized for a wrong order to show: minutes of CPU time",
    "test_a_resumed_paged_optimizer_is_paged_again": "bitsandbytes' CUDA library and its managed memory",
    "test_compile.py::test_modes_on_a_device": "code that inductor generates for a GPU",
    "placement/test_stream_models.py::test_real_streams": "sized for a wrong order to show: minutes of CPU time",
}
_FINISHED: list[int] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, reason in NEED_A_GPU.items():
            if name in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=f"needs a real GPU: {reason}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    if item.get_closest_marker("gpu") is None:
        return (yield)
    with SimulatedCuda() as cuda:
        outcome = yield
    if cuda.findings:
        pytest.fail("\n".join(f"x{count} {finding}" for finding, count in cuda.findings.items()), pytrace=False)
    return outcome


def pytest_sessionfinish(exitstatus: int) -> None:
    _FINISHED.append(int(exitstatus))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_FINISHED[0] if _FINISHED else 1)  # finalizers run in an order that the hooks do not survive
