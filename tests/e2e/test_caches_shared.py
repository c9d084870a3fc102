"""Caching by several processes at once, and training on the caches without their sources."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny.make import DIT, T5, VAE
from wan_train.storage import read_tensors

Tool = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory, run_tool: Tool) -> Path:
    """A copy of the tiny model and its clips, cached by two processes."""
    folder = tmp_path_factory.mktemp("shared") / "all"
    shutil.copytree(tiny, folder)
    data = folder / "data.toml"
    data.write_text(data.read_text().replace(str(tiny), str(folder)))
    return folder


def launch(root: Path, script: str, *arguments: object) -> str:
    """Two processes on the CPU; what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", script]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=root, env=os.environ | quiet, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_two_processes_cache_each_their_share_and_training_needs_no_source(
    folder: Path, root: Path, run_tool: Tool
) -> None:
    data = ("--dataset_config", folder / "data.toml")
    said = launch(root, "wan_cache_latents.py", *data, "--vae", folder / VAE, "--device", "cpu")
    said += launch(root, "wan_cache_text_encoder_outputs.py", *data, "--t5", folder / T5, "--device", "cpu")
    for kind in ("latents", "captions"):
        assert f"{kind} (process 1 of 2): 2 encoded" in said and f"{kind} (process 2 of 2): 1 encoded" in said
    shared = {path.name: dict(read_tensors(path)) for path in (folder / "cache").glob("*.safetensors")}
    assert len(shared) == 6
    alone = run_tool("wan_cache_latents.py", *data, "--vae", folder / VAE)
    assert "latents: 0 encoded, 3 kept" in alone.stderr

    shutil.rmtree(folder / "clips")
    training = (
        *("--task", "t2v-1.3B", "--dit", folder / DIT, *data, "--network_module", "networks.lora_wan"),
        *("--network_dim", 2, "--max_train_steps", 2, "--output_dir", folder / "out", "--output_name", "trusting"),
        *("--mixed_precision", "no", "--optimizer_type", "AdamW", "--seed", 1, "--max_data_loader_n_workers", 0),
    )
    refused = run_tool("wan_train_network.py", *training, expect=2)
    assert "no such folder" in refused.stderr
    run_tool("wan_train_network.py", *training, "--trust_cache")
    assert (folder / "out" / "trusting.safetensors").is_file()
