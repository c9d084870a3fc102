"""Full fine-tuning with two processes: what the first one saves on the way leaves their exchange alone."""

import pytest
import torch
from safetensors.torch import load_file

from tests import processes
from tests.e2e.test_full import Desk, desk

__all__ = ["desk"]  # the fixture


@pytest.mark.slow
def test_saving_an_average_finer_than_the_weights_changes_no_step(desk: Desk) -> None:
    plain = ("--full_bf16", "--optimizer_type", "AdamW", "--max_train_steps", 4)
    saving = ("--ema_decay", 0.5, "--ema_cpu", "--save_every_n_steps", 1)
    found = {}
    for name, options in {"alone": plain, "averaged": (*plain, *saving)}.items():
        processes.run("wan_train_network.py", *desk.training(name, *options), ranks=2)
        found[name] = load_file(desk.folder / "out" / f"{name}.safetensors")
    assert found["averaged"].keys() == found["alone"].keys()
    assert all(torch.equal(tensor, found["alone"][name]) for name, tensor in found["averaged"].items())
    assert desk.losses("averaged") == desk.losses("alone")
