"""A LoRA that we saved and converted does in diffusers what it does here."""

from pathlib import Path

import pytest
import torch
from diffusers import WanVACETransformer3DModel
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


def test_diffusers_loads_a_lora_of_vace_under_its_own_names(tmp_path: Path) -> None:
    """Its loader takes a file without a LoRA of the base's blocks under no other names."""
    pytest.importorskip("peft")
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    theirs = WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=16,
        out_channels=16,
        text_dim=20,
        ffn_dim=64,
        num_layers=3,
        vace_layers=[0, 2],
        vace_in_channels=96,
    ).eval()
    weights = {name: normal(name, parameter.shape) / 8 for name, parameter in theirs.state_dict().items()}
    theirs.load_state_dict(weights)
    ours = load_dit(weights, config={"num_heads": 2})
    latents, text, context = normal("x", (1, 16, 3, 4, 6)), normal("t", (1, 512, 20)), normal("c", (1, 96, 3, 4, 6))
    timestep = torch.tensor([500.0])
    plain = ours(latents, timestep, text, vace_context=context)

    projections = r"include_patterns=['.*\.(before|after)_proj']"
    adapter = create(ours, NetworkSettings(network_dim=4, network_alpha=3.0, network_args=(projections,)))
    for name, parameter in adapter.named_parameters():
        parameter.data.copy_(normal(name, parameter.shape) / 8)
    save_tensors(tmp_path / "lora.safetensors", adapter.export())
    paths = [str(tmp_path / name) for name in ("lora.safetensors", "theirs.safetensors")]
    assert run(CONVERT, ["--input", paths[0], "--output", paths[1], "--target", "diffusers"]) == 0
    converted = WanLoraLoaderMixin.lora_state_dict(load_file(paths[1]))
    WanLoraLoaderMixin.load_lora_into_transformer(converted, theirs)
    with torch.no_grad():
        expected = theirs(latents, timestep, text, control_hidden_states=context, return_dict=False)[0]
        assert relative_error(ours(latents, timestep, text, vace_context=context), expected) < TOLERANCE
        assert relative_error(plain.detach(), expected) > 0.05
