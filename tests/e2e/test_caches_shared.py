"""Caching by several processes at once, and training on the caches without their sources."""

import shutil
import subprocess
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


def test_two_processes_cache_each_their_share_and_training_needs_no_source(folder: Path, run_tool: Tool) -> None:
    data = ("--dataset_config", folder / "data.toml")
    cpu = ("--device", "cpu")
    said = run_tool("wan_cache_latents.py", *data, "--vae", folder / VAE, *cpu, ranks=2).stderr
    said += run_tool("wan_cache_text_encoder_outputs.py", *data, "--t5", folder / T5, *cpu, ranks=2).stderr
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
