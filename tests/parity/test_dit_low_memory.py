"""The golden T2V cases through models that were put together to save memory or time."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from networks.settings import NetworkSettings
from tests.parity.dit_cases import lora_file, run
from tests.parity.golden import load_case, relative_error
from tests.parity.test_dit_stored import CASES, CPU, file_of
from wan_train.assemble import ModelSettings, assemble_dit, attach_adapter, finish_dit, streamed_names
from wan_train.models.loading import official_shapes
from wan_train.models.settings import DitSettings
from wan_train.placement.settings import CompileSettings, RecomputeSettings, StreamSettings
from wan_train.quantization.settings import WeightSettings
from wan_train.storage import read_header

SWAP = StreamSettings(blocks_to_swap=1)
AOT = CompileSettings(compile=True, compile_backend="aot_eager")
# what: its parts of ModelSettings, and the largest relative error; 0 is equal to the bit
WAYS: dict[str, tuple[dict[str, object], float]] = {
    "streamed": ({"stream": SWAP, "activations": RecomputeSettings(recompute="full")}, 0.0),
    "recomputed": ({"activations": RecomputeSettings(recompute="full")}, 0.0),
    "keep_attention": ({"stream": SWAP, "activations": RecomputeSettings(recompute="keep_attention")}, 0.0),
    "offloaded": (
        {"activations": RecomputeSettings(recompute="full", gradient_checkpointing_cpu_offload=True)},
        0.0,
    ),
    "chunked": ({"activations": RecomputeSettings(recompute="full", ffn_chunks=3)}, 1e-5),
    "compiled": ({"compile": AOT, "stream": SWAP, "activations": RecomputeSettings(recompute="full")}, 1e-5),
}


def learn(path: str, case, parts: dict[str, object]) -> tuple[Tensor, Tensor, Tensor]:
    """The output without gradients, the output with, and the gradient of a LoRA."""
    settings = ModelSettings(DitSettings(dit=path, task="t2v-1.3B"), **({"activations": RecomputeSettings()} | parts))
    model = assemble_dit(settings, device=CPU)
    adapter = attach_adapter(model, NetworkSettings(network_dim=4, network_alpha=4), seed=0, device=CPU)
    adapter.load(lora_file(load_case("wan21_t2v_lora")))
    finish_dit(model, settings, CPU)
    with torch.no_grad():
        out = run(model, case)
    learnt = run(model, case)
    learnt.square().mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return out, learnt.detach(), gradient


@pytest.mark.parametrize(
    ("way", "name"),
    [
        pytest.param(way, name, marks=pytest.mark.slow if way == "compiled" and name != CASES[0] else ())
        for way, name in product(WAYS, CASES)
    ],
)
def test_output_and_gradients(name: str, way: str, tmp_path: Path) -> None:
    case = load_case(name)
    path = file_of(case, tmp_path)
    parts, largest = WAYS[way]
    for ours, plain in zip(learn(path, case, parts), learn(path, case, {}), strict=True):
        assert torch.equal(ours, plain) if largest == 0 else relative_error(ours, plain) < largest


@pytest.mark.parametrize("name", CASES)
def test_the_stored_output_through_everything(name: str, tmp_path: Path) -> None:
    case = load_case(name)
    activations = RecomputeSettings(recompute="keep_attention", gradient_checkpointing_cpu_offload=True, ffn_chunks=2)
    settings = ModelSettings(
        DitSettings(dit=file_of(case, tmp_path), task="t2v-1.3B", split_attn=True), stream=SWAP, activations=activations
    )
    model = assemble_dit(settings, device=CPU)
    finish_dit(model, settings, CPU)
    for _ in range(2):
        assert relative_error(run(model, case).detach(), case.outputs["out"]) < 1e-5


@pytest.mark.parametrize("weights", [WeightSettings(), WeightSettings(fp8_base=True, fp8_scaled=True)])
def test_what_streams_is_loaded_into_main_memory(weights: WeightSettings, tmp_path: Path) -> None:
    """Those tensors and no others: the device never holds more than it will."""
    path = file_of(load_case("wan21_t2v"), tmp_path)
    settings = ModelSettings(DitSettings(dit=path), weights, SWAP, RecomputeSettings(recompute="full"))
    model = assemble_dit(settings, device=CPU)
    attach_adapter(model, NetworkSettings(network_dim=4), seed=0, device=CPU)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    stays = streamed_names(SWAP, official_shapes(read_header(path).shapes))
    expected = {name for name, tensor in named.items() if stays(name) and not tensor.requires_grad}
    assert finish_dit(model, settings, CPU).names(model) == expected
    assert len(expected) == (10 if weights == WeightSettings() else 20)
    if weights == WeightSettings():
        apart = assemble_dit(settings, device=torch.device("meta"))
        assert {name for name, tensor in apart.named_parameters() if tensor.device == CPU} == expected
