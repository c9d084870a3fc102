"""A LoRA trained beside the weights that patterns choose."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.e2e.test_full import Desk, desk
from tests.tiny.make import DIT, SIZE, T5, VAE, dit_shapes, draw_weight
from wan_train.cli import run
from wan_train.training.settings import TOOL as TRAIN

__all__ = ["desk"]  # the fixture

ALSO = ("--trainable", "head.*", "blocks.0.ffn.*", "--train_also", "networks.lora_wan", "--network_dim", 4)


def lora_of(desk: Desk, name: str) -> dict[str, torch.Tensor]:
    return load_file(desk.folder / "out" / f"{name}.safetensors")


def test_both_files_hold_what_is_theirs_and_work_together(desk: Desk) -> None:
    before = load_file(desk.folder / DIT)
    after = desk.train("both", *ALSO, "--learning_rate", 1e-2, "--max_train_steps", 8, "--max_shard_size", "1GB")
    assert {name: tuple(tensor.shape) for name, tensor in after.items()} == dit_shapes()
    for name, tensor in after.items():
        chosen = name.startswith(("head.", "blocks.0.ffn."))
        assert torch.equal(tensor, before[name].float()) != chosen
    lora = lora_of(desk, "both_lora")
    assert all(key.startswith("lora_unet_blocks_") for key in lora)
    assert not any("blocks_0_ffn" in key for key in lora) and any("blocks_1_ffn" in key for key in lora)
    assert all(tensor.any() for key, tensor in lora.items() if "lora_up" in key)
    with safe_open(desk.folder / "out" / "both_lora.safetensors", "pt") as file:
        rows = file.metadata()
    assert rows["ss_network_module"] == "networks.lora_wan" and rows["ss_network_dim"] == "4"
    assert rows["modelspec.architecture"].endswith("/lora")
    with safe_open(desk.folder / "out" / "both.safetensors", "pt") as file:
        rows = file.metadata()
    assert rows["ss_network_module"] == "networks.full" and not rows["modelspec.architecture"].endswith("/lora")
    one, two = (generated(desk, name, lora=name == "with") for name in ("without", "with"))
    assert not np.array_equal(one, two)


def generated(desk: Desk, name: str, *, lora: bool) -> np.ndarray:
    out = desk.folder / f"{name}.safetensors"
    save_file(load_file(desk.folder / "out" / "both.safetensors"), out)
    words = ("--lora_weight", desk.folder / "out" / "both_lora.safetensors") if lora else ()
    desk.run_tool(
        "wan_generate_video.py",
        *("--task", "t2v-1.3B", "--dit", out, "--vae", desk.folder / VAE, "--t5", desk.folder / T5, *words),
        *("--video_size", *SIZE, "--video_length", 5, "--infer_steps", 2, "--seed", 3, "--prompt", "a blue square"),
        *("--save_path", desk.folder / f"{name}.safetensors.latent", "--output_type", "latent"),
    )
    (path,) = desk.folder.glob(f"{name}.safetensors.latent*/*latent*.safetensors")
    found: np.ndarray = load_file(path)["latent"].float().numpy()
    return found


MODES = {
    "float32": (),
    "bf16": ("--full_bf16", "--optimizer_type", "AdamW8bitSR"),
    "all": ("--full_bf16", "--fused_backward_pass", "--optimizer_cpu_offload", "--blocks_to_swap", 1),
}


@pytest.mark.parametrize("mode", MODES)
def test_it_goes_on_to_the_bit(desk: Desk, mode: str) -> None:
    options = (*ALSO, *MODES[mode], "--gradient_checkpointing", "--max_train_steps", 6, "--ema_decay", 0.5)
    whole = desk.train(f"{mode}-whole", *options), lora_of(desk, f"{mode}-whole_lora")
    averaged = lora_of(desk, f"{mode}-whole_lora-ema")
    desk.train(f"{mode}-parts", *options, "--save_every_n_steps", 2, "--save_state", "--save_last_n_steps", 4)
    out = desk.folder / "out"
    assert not (out / f"{mode}-parts_lora-step00000002.safetensors").exists()
    assert (out / f"{mode}-parts_lora-step00000004.safetensors").is_file()
    state = out / f"{mode}-parts-step00000004-state"
    parts = desk.train(f"{mode}-parts", *options, "--resume", state), lora_of(desk, f"{mode}-parts_lora")
    for found, wanted in zip(parts, whole, strict=True):
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    again = lora_of(desk, f"{mode}-parts_lora-ema")
    assert all(torch.equal(again[name], averaged[name]) for name in averaged)
    assert any(not torch.equal(averaged[name], whole[1][name]) for name in averaged)


def test_both_experts_have_theirs(desk: Desk) -> None:
    for name, salt in (("high2", "h."), ("low2", "l.")):
        weights = {key: draw_weight(salt + key, shape).bfloat16() for key, shape in dit_shapes().items()}
        save_file(weights, desk.folder / f"{name}.safetensors")
    experts = ("--task", "t2v-A14B", "--dit", desk.folder / "low2.safetensors", "--expert_steps", 2)
    desk.train("duo", *experts, "--dit_high_noise", desk.folder / "high2.safetensors", *ALSO)
    for expert in ("high_noise", "low_noise"):
        assert load_file(desk.folder / "out" / f"duo_{expert}.safetensors").keys() == dit_shapes().keys()
        assert any(tensor.any() for key, tensor in lora_of(desk, f"duo_{expert}_lora").items() if "lora_up" in key)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--train_also", "networks.lora_wan"), "otherwise all weights are trained"),
        (("--train_also", "networks.lora_wan", "--trainable", "blocks.*"), "leave no Linear layer in the blocks"),
        (("--train_also", "networks.full", "--trainable", "head.*"), "--train_also networks.full"),
        (("--train_also", "networks.lora_wan", "--network_module", "networks.lora_wan"), "--train_also is only for"),
        (("--trainable", "head.*", "--network_dim", 4), "--network_dim is only for LoRA"),
        ((*ALSO, "--network_args", "what=1"), "unknown key 'what'"),
    ],
    ids=["all", "none-left", "itself", "of-lora", "alone", "argument"],
)
def test_what_is_refused(desk: Desk, more: tuple[object, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(TRAIN, [str(word) for word in desk.training("no", *more)]) == 2
    assert told in capsys.readouterr().err.strip().splitlines()[-1]


def test_held_out_loss_is_of_both(desk: Desk) -> None:
    desk.train("seen", *ALSO, "--validation_split", 0.34, "--max_train_steps", 20)
    rows = map(json.loads, (desk.folder / "out" / "seen.metrics.jsonl").read_text().splitlines())
    first, *_, last = (row["validation"]["loss"] for row in rows if "validation" in row)
    assert last < first
    assert (desk.folder / "out" / "seen_lora-best.safetensors").is_file()
