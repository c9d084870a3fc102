"""A tiny model to run on, and a way to run the entry points as a user does."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from cache_tools.settings import LATENTS_TOOL, TEXT_TOOL
from generate.settings import TOOL as GENERATE
from tests import processes
from tests.tiny.make import make
from wan_train.cli import Tool
from wan_train.cli import run as run_in_process
from wan_train.training.settings import TOOL as TRAIN

TOOLS: dict[str, Tool] = {tool.program: tool for tool in (LATENTS_TOOL, TEXT_TOOL, TRAIN, GENERATE)}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tests/tiny: models under their official names, clips, data.toml and prompts.txt.

    It is made once for all tests, so whoever writes (caches included) writes to a folder of his own.
    """
    folder = tmp_path_factory.mktemp("tiny")
    make(folder)
    return folder


@pytest.fixture(scope="session")
def run_tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_tool("script.py", *arguments, expect=0)`: run it in a process of its own and check its exit code."""
    return processes.run


@pytest.fixture(scope="session")
def run_fresh(root: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same by a start of Python, for what a user's own start does: seconds more."""

    def run(script: str, *arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, script, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=root, env=os.environ | processes.QUIET, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == expect, (
            f"{' '.join(command)}\nexit code {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done

    return run


@pytest.fixture(scope="session")
def run_here() -> Callable[..., None]:
    """The same in this process, on one thread: without the seconds that each start of Python and torch takes."""

    def run(script: str, *arguments: object, expect: int = 0) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            assert run_in_process(TOOLS[script], [str(word) for word in arguments]) == expect
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            torch.set_num_threads(threads)

    return run
