"""What `--profile` leaves, and that it changes nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny.make import DIT, T5, VAE

Tool = Callable[..., None]


def test_a_profiled_video_is_the_same(tiny: Path, tmp_path: Path, run_here: Tool) -> None:
    for name, more in (("plain", ()), ("traced", ("--profile", tmp_path / "profile"))):
        run_here(
            "wan_generate_video.py",
            *("--task", "t2v-1.3B", "--dit", tiny / DIT, "--vae", tiny / VAE, "--t5", tiny / T5, "--prompt", "a cat"),
            *("--video_size", 32, 32, "--video_length", 1, "--infer_steps", 6, "--seed", 3, "--device", "cpu"),
            *("--save_path", tmp_path / f"{name}.png", *more),
        )
    assert (tmp_path / "traced.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    assert (tmp_path / "profile" / "sampling.trace.json.gz").stat().st_size > 1000
    assert "aten::addmm" in (tmp_path / "profile" / "sampling.operators.txt").read_text()


def test_a_profiled_run_is_the_same(tiny: Path, tmp_path: Path, run_here: Tool) -> None:
    folder = tmp_path / "all"
    shutil.copytree(tiny, folder)
    data = folder / "data.toml"
    data.write_text(data.read_text().replace(str(tiny), str(folder)))
    run_here("wan_cache_latents.py", "--dataset_config", data, "--vae", folder / VAE)
    run_here("wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--t5", folder / T5)
    losses = {}
    for name, more in (("plain", ()), ("traced", ("--profile", tmp_path / "profile"))):
        run_here(
            "wan_train_network.py",
            *("--task", "t2v-1.3B", "--dit", folder / DIT, "--dataset_config", data, "--trust_cache", "--sdpa"),
            *("--mixed_precision", "no", "--learning_rate", 2e-2, "--network_module", "networks.lora_wan"),
            *("--network_dim", 4, "--seed", 1, "--max_data_loader_n_workers", 0, "--max_train_steps", 6),
            *("--log_with", "none", "--no_metadata", "--output_dir", tmp_path / "out", "--output_name", name, *more),
        )
        rows = (tmp_path / "out" / f"{name}.metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(row)["loss"] for row in rows]
    assert losses["traced"] == losses["plain"] and len(losses["plain"]) == 6
    plain, traced = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("plain", "traced"))
    assert all(torch.equal(traced[name], plain[name]) for name in plain) and traced.keys() == plain.keys()
    assert "Optimizer.step" in (tmp_path / "profile" / "traced.operators.txt").read_text()
    assert "\nprofile = " not in (tmp_path / "out" / "traced.config.toml").read_text()


def test_what_takes_no_steps_is_not_profiled(
    tiny: Path, tmp_path: Path, run_here: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--dit", tiny / DIT, "--vae", tiny / VAE, "--latent_path", tmp_path, "--save_path", tmp_path)
    run_here("wan_generate_video.py", *words, "--profile", tmp_path, expect=2)
    assert "--profile traces sampling, which --latent_path does not do" in capsys.readouterr().err
