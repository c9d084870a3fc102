"""Caches, states and LoRA files that an earlier version wrote are still read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny.make import DIT, T5, VAE, write_dataset

Tool = Callable[..., None]
EARLIER = Path(__file__).parents[1] / "data" / "earlier"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The earlier files, writable, with a dataset file over them."""
    folder = tmp_path / "earlier"
    shutil.copytree(EARLIER, folder)
    write_dataset(folder / "data.toml", clips=folder / "clips", cache=folder / "cache", size=(32, 32), frames=5)
    return folder


def training(folder: Path, tiny: Path, name: str, *more: object) -> list[object]:
    return [
        *(
            "--task",
            "t2v-1.3B",
            "--dit",
            tiny / DIT,
            "--dataset_config",
            folder / "data.toml",
            "--mixed_precision",
            "no",
        ),
        *("--sdpa", "--log_with", "none", "--network_module", "networks.lora_wan", "--network_dim", 1, "--seed", 1),
        *("--network_args", "include_patterns=[r'.*blocks.0.self_attn.q']", "exclude_patterns=[r'.*']"),
        *("--max_data_loader_n_workers", 0, "--max_train_steps", 2, "--learning_rate", "1e-2"),
        *("--optimizer_type", "AdamW", "--output_dir", folder / "out", "--output_name", name, *more),
    ]


def losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def test_caches_are_kept(folder: Path, tiny: Path, run_here: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "cache").glob("*.safetensors")}
    run_here("wan_cache_latents.py", "--dataset_config", folder / "data.toml", "--vae", tiny / VAE)
    run_here("wan_cache_text_encoder_outputs.py", "--dataset_config", folder / "data.toml", "--t5", tiny / T5)
    assert capsys.readouterr().err.count("0 encoded, 1 kept") == 2
    assert {path.name: path.read_bytes() for path in (folder / "cache").glob("*.safetensors")} == before


@pytest.mark.parametrize("resume", ["folder", "auto"])
def test_a_state_is_resumed(folder: Path, tiny: Path, run_here: Tool, resume: str) -> None:
    state = folder / "out" / "old-step00000001-state" if resume == "folder" else "auto"
    run_here("wan_train_network.py", *training(folder, tiny, "old", "--resume", state))
    whole, resumed = (load_file(path / "out" / "old.safetensors") for path in (EARLIER, folder))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=1e-5)  # another CPU rounds otherwise
    earlier, now = (losses(path / "out" / "old.metrics.jsonl") for path in (EARLIER, folder))
    assert now == pytest.approx(earlier, rel=1e-3)


def test_a_lora_is_trained_further(folder: Path, tiny: Path, run_here: Tool) -> None:
    """At a rate of zero it is what it was."""
    weights = ("--network_weights", EARLIER / "out" / "old.safetensors", "--learning_rate", 0)
    run_here("wan_train_network.py", *training(folder, tiny, "further", *weights))
    whole, further = load_file(EARLIER / "out" / "old.safetensors"), load_file(folder / "out" / "further.safetensors")
    assert whole.keys() == further.keys() and all(torch.equal(further[name], whole[name]) for name in whole)
