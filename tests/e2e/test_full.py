"""Full fine-tuning through the same trainer: saved checkpoints, patterns, going on, both experts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.test_image_tasks import frames_of
from tests.tiny.make import DIT, SIZE, T5, VAE, dit_shapes, draw_weight
from wan_train.cli import run
from wan_train.training.settings import TOOL as TRAIN

Tool = Callable[..., None]


class Desk:
    """A folder with caches and the tiny model."""

    def __init__(self, folder: Path, run_tool: Tool) -> None:
        self.folder, self.run_tool = folder, run_tool

    def training(self, name: str, *more: object) -> list[object]:
        return [
            *(
                "--task",
                "t2v-1.3B",
                "--dit",
                self.folder / DIT,
                "--dataset_config",
                self.folder / "data.toml",
                "--sdpa",
            ),
            *("--network_module", "networks.full", "--mixed_precision", "no", "--learning_rate", 1e-3, "--seed", 1),
            *("--max_data_loader_n_workers", 0, "--max_train_steps", 4, "--log_with", "none"),
            *("--output_dir", self.folder / "out", "--output_name", name, *more),
        ]

    def train(self, name: str, *more: object) -> dict[str, torch.Tensor]:
        self.run_tool("wan_train_network.py", *self.training(name, *more))
        path = self.folder / "out" / f"{name}.safetensors"
        return load_file(path) if path.exists() else {}

    def losses(self, name: str) -> list[float]:
        lines = (self.folder / "out" / f"{name}.metrics.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    def generate(self, name: str, dit: Path) -> np.ndarray:
        self.run_tool(
            "wan_generate_video.py",
            *("--task", "t2v-1.3B", "--dit", dit, "--vae", self.folder / VAE, "--t5", self.folder / T5),
            *(
                "--video_size",
                *SIZE,
                "--video_length",
                5,
                "--infer_steps",
                2,
                "--seed",
                11,
                "--prompt",
                "a blue square",
            ),
            *("--save_path", self.folder / f"{name}.mp4", "--codec", "lossless"),
        )
        return frames_of(self.folder / f"{name}.mp4")


@pytest.fixture(scope="module")
def desk(tiny: Path, tmp_path_factory: pytest.TempPathFactory, run_here: Tool) -> Desk:
    folder = tmp_path_factory.mktemp("full") / "all"
    shutil.copytree(tiny, folder)
    data = folder / "data.toml"
    data.write_text(data.read_text().replace(str(tiny), str(folder)))
    run_here("wan_cache_latents.py", "--dataset_config", data, "--vae", folder / VAE)
    run_here("wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--t5", folder / T5)
    return Desk(folder, run_here)


def test_a_checkpoint_that_the_generator_loads(desk: Desk) -> None:
    before = load_file(desk.folder / DIT)
    after = desk.train("all", "--save_precision", "bf16", "--gradient_checkpointing", "--ema_decay", 0.5)
    assert {name: tuple(tensor.shape) for name, tensor in after.items()} == dit_shapes()
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    changed = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert len(changed) > 0.9 * len(after)  # in bfloat16 a norm near one may round to what it was
    assert (desk.folder / "out" / "all-ema.safetensors").is_file()
    plain = desk.generate("plain", desk.folder / DIT)
    assert not np.array_equal(desk.generate("tuned", desk.folder / "out" / "all.safetensors"), plain)


def test_it_learns_and_goes_on_to_the_bit(desk: Desk) -> None:
    whole = desk.train("whole", "--max_train_steps", 12)
    losses = desk.losses("whole")
    assert sum(losses[-3:]) < sum(losses[:3])
    desk.train("parts", "--max_train_steps", 12, "--save_every_n_steps", 5, "--save_state")
    state = desk.folder / "out" / "parts-step00000005-state"
    parts = desk.train("parts", "--max_train_steps", 12, "--resume", state)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert desk.losses("parts") == losses


def test_rounded_at_random_it_learns_as_in_float32_and_goes_on_to_the_bit(desk: Desk) -> None:
    options = ("--max_train_steps", 12, "--full_bf16", "--optimizer_type", "AdamW", "--ema_decay", 0.9)
    whole = desk.train("coarse", *options, "--save_precision", "float")
    losses = desk.losses("coarse")
    desk.train("fine", "--max_train_steps", 12, "--optimizer_type", "AdamW")
    fine = desk.losses("fine")
    assert sum(losses[-3:]) < sum(losses[:3])
    assert abs(sum(losses[-3:]) / sum(fine[-3:]) - 1) < 0.02
    averaged = load_file(desk.folder / "out" / "coarse-ema.safetensors")
    matrix = "blocks.0.ffn.0.weight"
    assert torch.equal(whole[matrix], whole[matrix].bfloat16().float())
    assert not torch.equal(averaged[matrix], averaged[matrix].bfloat16().float())  # the average is in float32
    desk.train("coarser", *options, "--save_every_n_steps", 5, "--save_state")
    state = desk.folder / "out" / "coarser-step00000005-state"
    parts = desk.train("coarser", *options, "--save_precision", "float", "--resume", state)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert desk.losses("coarser") == losses


def test_held_out_loss_falls_in_bf16_as_in_float32(desk: Desk) -> None:
    """From random weights: the tiny model has no others."""
    options = ("--max_train_steps", 30, "--validation_split", 0.34, "--validation_timesteps", 4)
    found = {}
    for name, more in {"fine": (), "coarse": ("--full_bf16",)}.items():
        desk.train(f"held-{name}", *options, "--optimizer_type", "AdamW", *more)
        rows = map(json.loads, (desk.folder / "out" / f"held-{name}.metrics.jsonl").read_text().splitlines())
        first, *_, last = (row["validation"]["loss"] for row in rows if "validation" in row)
        found[name] = first - last
        assert last < 0.9 * first
    assert found["coarse"] == pytest.approx(found["fine"], rel=0.02)


def test_patterns_leave_the_rest_alone(desk: Desk) -> None:
    before = load_file(desk.folder / DIT)
    after = desk.train("some", "--trainable", "blocks.*.self_attn.*", "head.*")
    for name, tensor in after.items():
        chosen = ".self_attn." in name or name.startswith("head.")
        assert torch.equal(tensor, before[name].float()) != chosen


def test_both_experts(desk: Desk) -> None:
    for name, salt in (("high", "h."), ("low", "l.")):
        weights = {key: draw_weight(salt + key, shape).bfloat16() for key, shape in dit_shapes().items()}
        save_file(weights, desk.folder / f"{name}.safetensors")
    experts = ("--task", "t2v-A14B", "--dit", desk.folder / "low.safetensors")
    desk.train("pair", *experts, "--dit_high_noise", desk.folder / "high.safetensors", "--expert_steps", 2)
    for name in ("high", "low"):
        tuned, base = (
            load_file(desk.folder / path) for path in (f"out/pair_{name}_noise.safetensors", f"{name}.safetensors")
        )
        assert tuned.keys() == base.keys()
        assert any(not torch.equal(tuned[key], base[key].float()) for key in base)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--fp8_base",), "--fp8_base"),
        (("--fused_backward_pass", "--gradient_accumulation_steps", 2), "--gradient_accumulation_steps 2"),
        (("--fused_backward_pass", "--mixed_precision", "fp16"), "fp16"),
        (("--fused_backward_pass", "--optimizer_type", "Prodigy"), "--fused_backward_pass"),
        (("--optimizer_cpu_offload", "--optimizer_type", "PagedAdamW8bit"), "--optimizer_cpu_offload"),
        (("--network_dim", 4), "--network_dim"),
        (("--trainable", "nothing.*"), "--trainable nothing.*"),
        (("--full_bf16", "--optimizer_type", "Prodigy"), "--full_bf16"),
        (("--full_bf16", "--network_module", "networks.lora_wan"), "--full_bf16"),
    ],
)
def test_what_is_refused(desk: Desk, more: tuple[object, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(TRAIN, [str(word) for word in desk.training("no", *more)]) == 2
    assert told in capsys.readouterr().err.strip().splitlines()[-1]
