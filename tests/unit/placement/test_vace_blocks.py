"""VACE's blocks save memory and time as the base's do, with what they learn unchanged."""

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from networks.settings import NetworkSettings
from tests.tiny.make import Shapes, dit_shapes, draw_weight
from wan_train.assemble import ModelSettings, assemble_dit, attach_adapter, check_model, finish_dit
from wan_train.errors import InputError
from wan_train.models.dit.dit import Dit
from wan_train.models.settings import DitSettings
from wan_train.models.variants import VARIANTS
from wan_train.placement.settings import CompileSettings, RecomputeSettings, StreamSettings
from wan_train.precision import Linear
from wan_train.quantization.settings import WeightSettings

CPU = torch.device("cpu")
FULL, KEPT = RecomputeSettings(recompute="full"), RecomputeSettings(recompute="keep_attention")
OFFLOADED = RecomputeSettings(recompute="keep_attention", gradient_checkpointing_cpu_offload=True)
ALL_BUT_ONE = StreamSettings(blocks_to_swap=4)  # of three blocks and two of VACE
COMPILED = CompileSettings(compile=True, compile_backend="eager")
WAYS: dict[str, dict[str, object]] = {
    "recomputed": {"activations": FULL},
    "keep_attention": {"activations": KEPT},
    "offloaded": {"activations": OFFLOADED},
    "streamed": {"stream": ALL_BUT_ONE, "activations": FULL},
    "compiled": {"compile": COMPILED},
    "all": {"stream": ALL_BUT_ONE, "activations": OFFLOADED, "compile": COMPILED},
}
WEIGHTS = {
    "plain": WeightSettings(),
    "fp8": WeightSettings(fp8_base=True, fp8_scaled=True),
    "int8": WeightSettings(int8_base=True),
}


def vace_shapes(layers: int = 3, dim: int = 128) -> Shapes:
    """A base with VACE blocks behind its first block and its third."""
    shapes = dit_shapes(dim=dim, ffn_dim=192, num_layers=layers)
    beside: Shapes = {"vace_patch_embedding.weight": (dim, 96, 1, 2, 2), "vace_patch_embedding.bias": (dim,)}
    for number in (0, 1):
        for name, shape in shapes.items():
            if name.startswith("blocks.0."):
                beside[name.replace("blocks.0.", f"vace_blocks.{number}.")] = shape
        for part in ("before_proj", "after_proj")[number:]:
            beside |= {f"vace_blocks.{number}.{part}.weight": (dim, dim), f"vace_blocks.{number}.{part}.bias": (dim,)}
    return shapes | beside


def settings(path: Path, **parts: object) -> ModelSettings:
    given: dict[str, object] = {"activations": RecomputeSettings()} | parts
    return ModelSettings(DitSettings(dit=str(path), task="vace-1.3B"), **given)  # type: ignore[arg-type]


def learn(path: Path, network: NetworkSettings, **parts: object) -> list[Tensor]:
    """Outputs and gradients of two steps with different sizes."""
    made = settings(path, **parts)
    model = assemble_dit(made, device=CPU)
    adapter = attach_adapter(model, network, made.stream, seed=0, device=CPU)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapter.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    finish_dit(model, made, CPU)
    found = []
    for frames in (2, 3):
        out = passed(model.train(), frames)
        out.square().mean().backward()
        found.append(out.detach())
    return [*found, *(p.grad.clone() for _, p in adapter.named_parameters() if p.grad is not None)]


def passed(model: Dit, frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    latents = torch.randn(1, 16, frames, 4, 6, generator=generator)
    context = torch.randn(1, 96, frames, 4, 6, generator=generator)
    out: Tensor = model(latents, torch.tensor([400.0]), [torch.randn(4, 64, generator=generator)], vace_context=context)
    return out


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vace") / "vace.safetensors"
    save_file({name: draw_weight(name, shape) for name, shape in vace_shapes().items()}, path)
    return path


LORA = NetworkSettings(network_dim=2, network_alpha=2)
FULL_WEIGHTS = NetworkSettings(network_module="networks.full", trainable=("vace_blocks.*", "vace_patch_embedding.*"))


@cache
def plain(path: Path, weights: str, network: NetworkSettings) -> list[Tensor]:
    return learn(path, network, weights=WEIGHTS[weights])


# Compilation takes long, and meets no other products with other weights.
CASES = [
    pytest.param(way, weights, marks=[pytest.mark.slow] if way == "all" else [])
    for way in WAYS
    for weights in WEIGHTS
    if weights == "plain" or "compile" not in WAYS[way]
]


@pytest.mark.parametrize(("way", "weights"), CASES)
def test_a_lora_learns_the_same(path: Path, way: str, weights: str) -> None:
    wanted = plain(path, weights, LORA)
    torch._dynamo.reset()
    found = learn(path, LORA, weights=WEIGHTS[weights], **WAYS[way])
    assert len(wanted) == 2 + 2 * 20
    if "compile" not in WAYS[way]:
        assert all(map(torch.equal, found, wanted))
    for ours, theirs in zip(found, wanted, strict=True):  # a graph adds a branch in another way, which rounds otherwise
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow if way == "all" else ()) for way in WAYS])
def test_the_weights_of_the_blocks_learn_the_same(path: Path, way: str) -> None:
    wanted, found = plain(path, "plain", FULL_WEIGHTS), learn(path, FULL_WEIGHTS, **WAYS[way])
    assert len(wanted) == 2 + 2 * 27 + 2 * 3 + 2 and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("weights", ["fp8", "int8"])
def test_their_matrices_are_quantised(path: Path, weights: str) -> None:
    model = assemble_dit(settings(path, weights=WEIGHTS[weights]), device=CPU)
    for linear in (model.vace_blocks[0].before_proj, model.vace_blocks[1].after_proj, model.vace_blocks[1].ffn[0]):
        assert not isinstance(linear, Linear) or linear.weight.element_size() == 1


def test_as_many_blocks_as_both_stacks_have_but_one_may_stream(path: Path) -> None:
    most = settings(path, stream=StreamSettings(blocks_to_swap=4), activations=FULL)
    assert check_model(most, VARIANTS["vace-1.3B"], CPU)  # of another size, no more
    with pytest.raises(InputError, match="for a model of 5 blocks: use at most 4"):
        check_model(
            settings(path, stream=StreamSettings(blocks_to_swap=5), activations=FULL), VARIANTS["vace-1.3B"], CPU
        )


def test_chunks_of_the_feed_forward(path: Path) -> None:
    chunked = RecomputeSettings(recompute="full", ffn_chunks=3)
    for found, wanted in zip(learn(path, LORA, activations=chunked), plain(path, "plain", LORA), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
