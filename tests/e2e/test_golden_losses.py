"""The losses of a run of 20 steps are what they were: a change that shall not change training does not.

To record them anew after one that shall: `python -m pytest tests/e2e/test_golden_losses.py --record-losses`.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from tests.tiny.make import DIT, T5, VAE

STORED = Path(__file__).parents[1] / "golden" / "losses.json"
Tool = Callable[..., CompletedProcess[str]]


def machine() -> dict[str, str]:
    """What the last bits of a loss depend on."""
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


def test_losses_of_twenty_steps(tiny: Path, tmp_path: Path, run_tool: Tool, request: pytest.FixtureRequest) -> None:
    folder = tmp_path / "all"
    shutil.copytree(tiny, folder)
    data = folder / "data.toml"
    data.write_text(data.read_text().replace(str(tiny), str(folder)))
    run_tool("wan_cache_latents.py", "--dataset_config", data, "--vae", folder / VAE)
    run_tool("wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--t5", folder / T5)
    run_tool(
        "wan_train_network.py",
        *("--task", "t2v-1.3B", "--dit", folder / DIT, "--dataset_config", data, "--mixed_precision", "no"),
        *("--network_module", "networks.lora_wan", "--network_dim", 4, "--network_alpha", 4, "--learning_rate", 2e-2),
        *("--timestep_sampling", "shift", "--discrete_flow_shift", 3.0, "--network_dropout", 0.1, "--seed", 42),
        *("--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine", "--lr_warmup_steps", 3, "--log_with", "none"),
        *("--max_train_steps", 20, "--max_data_loader_n_workers", 0, "--output_dir", folder, "--output_name", "name"),
    )
    rows = [json.loads(line) for line in (folder / "name.metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    if request.config.getoption("--record-losses"):
        STORED.write_text(json.dumps(machine() | {"losses": losses}, indent=1) + "\n")
    stored = json.loads(STORED.read_text())
    if machine() == {key: stored[key] for key in machine()}:
        assert losses == stored["losses"]
    assert losses == pytest.approx(stored["losses"], rel=1e-3)
