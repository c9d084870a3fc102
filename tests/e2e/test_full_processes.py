"""Full fine-tuning with two processes: what the first one saves on the way leaves their exchange alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.test_full import Desk, desk

__all__ = ["desk"]  # the fixture


@pytest.mark.slow
def test_saving_an_average_finer_than_the_weights_changes_no_step(desk: Desk, root: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "wan_train_network.py"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    plain = ("--full_bf16", "--optimizer_type", "AdamW", "--max_train_steps", 4)
    saving = ("--ema_decay", 0.5, "--ema_cpu", "--save_every_n_steps", 1)
    found = {}
    for name, options in {"alone": plain, "averaged": (*plain, *saving)}.items():
        command = [*launcher, *map(str, desk.training(name, *options))]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
        # gloo's threads sometimes abort a process that has finished everything; no other failure is let pass.
        assert done.returncode == 0 or re.search(r"exitcode\s*: -6", done.stderr), done.stderr[-3000:]
        found[name] = load_file(desk.folder / "out" / f"{name}.safetensors")
    assert found["averaged"].keys() == found["alone"].keys()
    assert all(torch.equal(tensor, found["alone"][name]) for name, tensor in found["averaged"].items())
    assert desk.losses("averaged") == desk.losses("alone")
