"""A LoRA that we saved and converted does in diffusers what it does here."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from networks.adapter import create
from networks.settings import TOOL as CONVERT
from networks.settings import NetworkSettings
from tests.parity.golden import TOLERANCE, normal, relative_error
from tests.parity.theirs import tiny_transformer
from wan_train.cli import run
from wan_train.models.loading import load_dit
from wan_train.storage import save_tensors


def test_diffusers_loads_the_converted_file(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    theirs, weights = tiny_transformer()
    ours = load_dit(weights, config={"num_heads": 2})
    latents, timestep, text = normal("latents", (1, 16, 2, 4, 6)), torch.tensor([500.0]), normal("text", (1, 512, 20))
    plain = ours(latents, timestep, text)

    adapter = create(ours, NetworkSettings(network_dim=4, network_alpha=3.0))
    trained = {
        name: tensor if name.endswith("alpha") else normal(name, tuple(tensor.shape))
        for name, tensor in adapter.export().items()
    }
    adapter.load(trained)
    save_tensors(tmp_path / "lora.safetensors", adapter.export())
    paths = [str(tmp_path / name) for name in ("lora.safetensors", "comfy.safetensors")]
    assert run(CONVERT, ["--input", paths[0], "--output", paths[1], "--target", "other"]) == 0

    converted = WanLoraLoaderMixin.lora_state_dict(load_file(paths[1]))
    WanLoraLoaderMixin.load_lora_into_transformer(converted, theirs)
    with torch.no_grad():
        expected = theirs(latents, timestep, text, return_dict=False)[0]
        assert relative_error(ours(latents, timestep, text), expected) < TOLERANCE
        assert relative_error(plain.detach(), expected) > 0.05
