"""The tests that need a GPU pass on the simulated one, where there is none."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes

QUICK = ("tests/unit/placement/test_lanes.py", "tests/unit/training/optimizing/test_ema.py")
ALL = pytest.param(("tests/unit",), 25, marks=pytest.mark.slow)


@pytest.mark.parametrize(("paths", "least"), [(QUICK, 3), ALL], ids=["quick", "all"])
def test_gpu_tests_pass_on_the_simulated_device(root: Path, paths: tuple[str, ...], least: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.device.plugin", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *paths], cwd=root, env=os.environ | processes.QUIET, capture_output=True, text=True
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= least, done.stdout[-5000:] + done.stderr[-2000:]
