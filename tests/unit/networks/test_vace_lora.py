"""A LoRA on a VACE model: which modules it trains, and the names that files have for them."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from networks.attached import attach_loras
from networks.deltas.lora import LoraDelta
from networks.formats.files import check_lora, read_lora
from networks.lora_wan import attach
from networks.merge import merged
from networks.settings import TOOL, NetworkSettings
from tests.tiny.make import TEXT_DIM, Shapes, draw_weight
from tests.unit.placement.test_vace_blocks import vace_shapes
from wan_train.cli import run
from wan_train.models.dit.dit import Dit
from wan_train.models.loading import linears_of, load_dit
from wan_train.models.weights import diffusers_name
from wan_train.storage import read_tensors, save_tensors

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


@dataclass(frozen=True)
class Style:
    """How files of a tool name a pair: U is the module with underscores, M with dots, D in diffusers' names."""

    pattern: str
    down: str
    up: str
    has_alpha: bool = False


STYLES = {
    "kohya": Style("lora_unet_{U}", "lora_down.weight", "lora_up.weight", has_alpha=True),
    "VideoX-Fun": Style("lora_unet__{U}", "lora_down.weight", "lora_up.weight", has_alpha=True),
    "ComfyUI": Style("diffusion_model.{M}", "lora_A.weight", "lora_B.weight"),
    "lightx2v": Style("diffusion_model.{M}", "lora_down.weight", "lora_up.weight"),
    "diffusers": Style("transformer.{D}", "lora_A.weight", "lora_B.weight"),
    "DiffSynth": Style("{M}", "lora_A.default.weight", "lora_B.default.weight"),
    "bare": Style("{M}", "lora_A.weight", "lora_B.weight"),
}
WRITTEN = {
    "ComfyUI": ("--target", "other"),
    "diffusers": ("--target", "diffusers"),
    "bare": ("--target", "other", "--diffusers_prefix", ""),
}
KEYS = {
    "kohya": ("lora_unet_vace_blocks_0_self_attn_q.lora_down.weight", "lora_unet_vace_blocks_0_before_proj.alpha"),
    "VideoX-Fun": ("lora_unet__vace_blocks_0_self_attn_q.lora_down.weight", "lora_unet__ref_conv.lora_up.weight"),
    "ComfyUI": ("diffusion_model.vace_blocks.0.self_attn.q.lora_A.weight", "diffusion_model.ref_conv.lora_B.weight"),
    "lightx2v": ("diffusion_model.vace_blocks.1.after_proj.lora_up.weight",),
    "diffusers": (
        "transformer.vace_blocks.0.attn1.to_q.lora_A.weight",
        "transformer.vace_blocks.0.proj_in.lora_A.weight",
        "transformer.vace_blocks.1.proj_out.lora_B.weight",
    ),
    "bare": ("vace_blocks.0.before_proj.lora_A.weight",),
    "DiffSynth": ("vace_blocks.0.self_attn.q.lora_A.default.weight", "ref_conv.lora_B.default.weight"),
}
OWN = ()
MORE = (r"include_patterns=['.*\.(before|after)_proj','ref_conv']",)


def shapes_with_reference() -> Shapes:
    """No published model has both; a file of one may."""
    return vace_shapes(dim=32) | {"ref_conv.weight": (32, 16, 2, 2), "ref_conv.bias": (32,)}


def learnt(arguments: tuple[str, ...]) -> dict[str, LoraDelta]:
    """A trained LoRA, its scale a power of two, which costs no precision where a naming has no alpha."""
    generator = torch.Generator().manual_seed(5)
    dit = load_dit({name: torch.zeros(shape) for name, shape in shapes_with_reference().items()})
    adapter = attach(dit, NetworkSettings(network_dim=2, network_args=arguments))
    for _, parameter in adapter.named_parameters():
        parameter.data.normal_(generator=generator).mul_(0.1)
    return read_lora(adapter.export(), linears_of(shapes_with_reference()))


def written(deltas: dict[str, LoraDelta], style: Style) -> dict[str, Tensor]:
    tensors = {}
    for module, delta in deltas.items():
        name = style.pattern.format(U=module.replace(".", "_"), M=module, D=diffusers_name(module))
        up = delta.up if style.has_alpha else delta.up * delta.scale
        tensors |= {f"{name}.{style.down}": delta.down, f"{name}.{style.up}": up}
        if style.has_alpha:
            tensors[f"{name}.alpha"] = torch.tensor(delta.scale * len(delta.down))
    return tensors


def products(deltas: dict[str, LoraDelta]) -> dict[str, Tensor]:
    found = {module: torch.zeros(delta.shape) for module, delta in deltas.items()}
    for module, delta in deltas.items():
        delta.add_to(found[module], 1.0)
    return found


def assert_same(ours: dict[str, LoraDelta], theirs: dict[str, LoraDelta]) -> None:
    first, second = products(ours), products(theirs)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("arguments", "num_modules"), [(OWN, 20), (MORE, 24)])
@pytest.mark.parametrize("name", STYLES)
def test_every_naming_is_read_and_converted_there_and_back(
    tmp_path: Path, name: str, arguments: tuple[str, ...], num_modules: int
) -> None:
    deltas, shapes = learnt(arguments), linears_of(shapes_with_reference())
    tensors = written(deltas, STYLES[name])
    assert arguments == OWN or set(KEYS[name]) <= tensors.keys()
    path, kohya = tmp_path / "style.safetensors", tmp_path / "kohya.safetensors"
    save_tensors(path, tensors)
    assert len(check_lora(path, shapes)) == num_modules
    assert_same(read_lora(path, shapes), deltas)
    assert run(TOOL, ["--input", str(path), "--output", str(kohya), "--target", "default"]) == 0
    assert dict(read_tensors(kohya)).keys() == written(deltas, STYLES["kohya"]).keys()
    assert_same(read_lora(kohya, shapes), deltas)
    for style, target in WRITTEN.items():
        there, back = tmp_path / f"there_{style}.safetensors", tmp_path / f"back_{style}.safetensors"
        assert run(TOOL, ["--input", str(kohya), "--output", str(there), *target]) == 0
        assert dict(read_tensors(there)).keys() == written(deltas, STYLES[style]).keys()
        assert run(TOOL, ["--input", str(there), "--output", str(back), "--target", "default"]) == 0
        assert dict(read_tensors(back)).keys() == dict(read_tensors(kohya)).keys()
        assert_same(read_lora(back, shapes), deltas)


@pytest.mark.parametrize("name", STYLES)
def test_merged_equals_attached(name: str) -> None:
    shapes = shapes_with_reference()
    weights = {key: draw_weight(key, shape) for key, shape in shapes.items()}
    deltas = read_lora(written(learnt(MORE), STYLES[name]), linears_of(shapes))
    generator = torch.Generator().manual_seed(3)
    latents, context, hints, reference = (
        torch.randn(shape, generator=generator)
        for shape in ((1, 16, 2, 4, 6), (1, 5, TEXT_DIM), (1, 96, 3, 4, 6), (1, 16, 1, 4, 6))
    )

    def velocity(dit: Dit) -> Tensor:
        return dit(latents, torch.tensor([500.0]), context, vace_context=hints, reference_latents=reference)

    attached = load_dit(weights)
    attach_loras(attached, [(deltas, 0.7)], device=torch.device("cpu"))
    summed = load_dit(dict(merged(weights.items(), [(deltas, 0.7)])))
    torch.testing.assert_close(velocity(attached), velocity(summed), rtol=0, atol=1e-4)
    assert (velocity(attached) - velocity(load_dit(weights))).abs().max() > 1e-3
