"""A LoRA on a VACE model: which modules it trains, and the names that files have for them."""

import pytest
import torch

from networks.formats.files import read_lora
from networks.lora_wan import attach
from networks.settings import NetworkSettings
from tests.unit.placement.test_vace_blocks import vace_shapes
from wan_train.models.dit.dit import Dit
from wan_train.models.loading import linears_of, load_dit
from wan_train.models.weights import diffusers_name

PROJECTIONS = r"include_patterns=['.*\.(before|after)_proj']"


def model() -> Dit:
    return load_dit({name: torch.zeros(shape) for name, shape in vace_shapes().items()})


@pytest.mark.parametrize(
    ("arguments", "stacks", "num_modules"),
    [
        ((), {"vace_blocks"}, 20),
        ((r"include_patterns=['blocks\..*']",), {"vace_blocks", "blocks"}, 50),
        ((PROJECTIONS,), {"vace_blocks"}, 23),
        ((r"exclude_patterns=['.*ffn.*']",), {"vace_blocks"}, 16),
    ],
)
def test_its_own_blocks_are_trained_by_default(arguments: tuple[str, ...], stacks: set[str], num_modules: int) -> None:
    adapter = attach(model(), NetworkSettings(network_dim=2, network_args=arguments))
    names = list(adapter.branches)
    assert {name.partition(".")[0] for name in names} == stacks and len(names) == num_modules
    assert any("_proj" in name for name in names) == (PROJECTIONS in arguments)


STYLES = {
    "kohya": ("lora_unet_{U}", "lora_down", "lora_up"),
    "VideoX-Fun": ("lora_unet__{U}", "lora_down", "lora_up"),
    "ComfyUI": ("diffusion_model.{M}", "lora_down", "lora_up"),
    "peft": ("diffusion_model.{M}", "lora_A", "lora_B"),
    "diffusers": ("transformer.{D}", "lora_A", "lora_B"),
    "DiffSynth": ("{M}", "lora_A.default", "lora_B.default"),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_naming_is_read(style: str) -> None:
    pattern, down, up = STYLES[style]
    shapes = linears_of(vace_shapes())
    tensors, wanted = {}, {}
    for module, (out, width) in shapes.items():
        if module.startswith("vace_blocks."):
            written = pattern.format(U=module.replace(".", "_"), M=module, D=diffusers_name(module))
            wanted[module] = torch.randn(2, width), torch.randn(out, 2)
            tensors |= {f"{written}.{down}.weight": wanted[module][0], f"{written}.{up}.weight": wanted[module][1]}
    found = read_lora(tensors, shapes)
    assert found.keys() == wanted.keys() and len(found) == 23
    assert all(
        torch.equal(found[name].down, pair[0]) and torch.equal(found[name].up, pair[1]) for name, pair in wanted.items()
    )
