"""Several LoRA files at once, of each of two experts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from generate.models import Models
from generate.preflight import check_generation
from tests.tiny.make import DIT
from tests.unit.generate.conftest import Given
from wan_train.models.dit.experts import HIGH, LOW

CPU = torch.device("cpu")
LAYERS = ("blocks.0.self_attn.q", "blocks.1.ffn.0")
RANK, ALPHA = 2, 3.0


def write_lora(path: Path, weights: dict[str, Tensor], seed: int) -> Path:
    """A LoRA of kohya's keys for the layers."""
    generator = torch.Generator().manual_seed(seed)
    rows = {}
    for layer in LAYERS:
        out, width = weights[f"{layer}.weight"].shape
        name = f"lora_unet_{layer.replace('.', '_')}"
        rows[f"{name}.lora_down.weight"] = torch.randn(RANK, width, generator=generator) * 0.1
        rows[f"{name}.lora_up.weight"] = torch.randn(out, RANK, generator=generator) * 0.1
        rows[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file(rows, path)
    return path


@pytest.mark.parametrize("mode", ["merge", "attach"])
def test_two_files_for_each_expert_add_up_by_their_multipliers(
    mode: str, given: Given, models: Path, tmp_path: Path
) -> None:
    weights = {name: tensor.float() for name, tensor in load_file(models / DIT).items()}
    save_file(weights, tmp_path / "dit.safetensors")
    files = [write_lora(tmp_path / f"{seed}.safetensors", weights, seed) for seed in range(4)]
    settings = given(
        *(
            "--task",
            "t2v-A14B",
            "--dit",
            tmp_path / "dit.safetensors",
            "--dit_high_noise",
            tmp_path / "dit.safetensors",
        ),
        *("--lora_weight", *files[:2], "--lora_multiplier", 0.5, -2, "--lora_mode", mode),
        *("--lora_weight_high_noise", *files[2:], "--lora_multiplier_high_noise", 1.5),
        *("--prompt", "a", "--save_path", tmp_path / "a.mp4"),
    )
    made = Models(settings, check_generation(settings, CPU, wants_frames=True), CPU)
    # A multiplier that is not given is 1.
    for expert, used in ((LOW, {files[0]: 0.5, files[1]: -2.0}), (HIGH, {files[2]: 1.5, files[3]: 1.0})):
        with made.dit(expert) as dit, torch.no_grad():
            for layer in LAYERS:
                by_hand = weights[f"{layer}.weight"].double()
                for file, multiplier in used.items():
                    rows, name = load_file(file), f"lora_unet_{layer.replace('.', '_')}"
                    up, down = rows[f"{name}.lora_up.weight"].double(), rows[f"{name}.lora_down.weight"].double()
                    by_hand += multiplier * ALPHA / RANK * up @ down
                part = dit.model.get_submodule(layer)
                x = torch.randn(5, by_hand.shape[1], generator=torch.Generator().manual_seed(9))
                wanted = x.double() @ by_hand.T + weights[f"{layer}.bias"].double()
                assert (part(x) - wanted).norm() < 1e-6 * wanted.norm()
