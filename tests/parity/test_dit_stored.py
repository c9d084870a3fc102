"""The golden T2V cases with their blocks stored in fewer bits: files of every precision, and how far each is off."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from networks.adapter import create
from networks.settings import NetworkSettings
from tests.parity.dit_cases import lora_file, run
from tests.parity.golden import Case, load_case, relative_error
from wan_train.assemble import ModelSettings, WeightedLora, assemble_dit, check_model
from wan_train.errors import InputError
from wan_train.models.dit.dit import Dit
from wan_train.models.loading import official_shapes
from wan_train.models.settings import DitSettings
from wan_train.models.stacks import block_matrices
from wan_train.models.variants import VARIANTS
from wan_train.precision import Linear
from wan_train.quantization.schemes import Fp8Linear
from wan_train.quantization.settings import FastWeightSettings
from wan_train.quantization.stored import plan_storage
from wan_train.storage import read_header

CPU = torch.device("cpu")
CASES = ("wan21_t2v", "wan21_t2i")
FP8, SCALED, INT8 = {"fp8_base": True}, {"fp8_base": True, "fp8_scaled": True}, {"int8_base": True}
# The relative error of the velocity, as docs/memory.md states it.
LARGEST = {"fp8": 0.013, "fp8_scaled": 0.011, "fp8_fast": 0.018, "int8": 0.004, "int8_ffn2": 0.005}


def file_of(case: Case, folder: Path, tensors: dict[str, Tensor] | None = None) -> str:
    save_file(tensors or case.state_dict(), folder / "dit.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_heads": case.spec["config"]["num_heads"]}))
    return str(folder / "dit.safetensors")


def settings_of(path: str, **weights: bool) -> ModelSettings:
    return ModelSettings(DitSettings(dit=path, task="t2v-1.3B"), FastWeightSettings(**weights))


def build(path: str, loras: tuple[WeightedLora, ...] = (), **weights: bool) -> Dit:
    return assemble_dit(settings_of(path, **weights), device=CPU, loras=loras)


@torch.no_grad()
def error(model: Dit, case: Case) -> float:
    return relative_error(run(model, case), case.outputs["out"])


def scaled_file(tensors: dict[str, Tensor], name: str = "scale_weight", prefix: str = "") -> dict[str, Tensor]:
    """As ComfyUI writes it: e4m3 and one scale for each matrix, those outside the blocks too."""
    out: dict[str, Tensor] = {}
    for key, weight in tensors.items():
        if key.endswith(".weight") and weight.ndim == 2:
            scale = weight.abs().max() / 448
            out[prefix + key] = (weight / scale).to(torch.float8_e4m3fn)
            out[f"{prefix}{key.removesuffix('weight')}{name}"] = scale
        else:
            out[prefix + key] = weight.half()
    return out


@pytest.mark.parametrize("name", CASES)
def test_error_of_each_precision(name: str, tmp_path: Path) -> None:
    case = load_case(name)
    path = file_of(case, tmp_path)
    assert error(build(path), case) < 1e-6
    fp8, scaled = error(build(path, **FP8), case), error(build(path, **SCALED), case)
    assert scaled < fp8 < LARGEST["fp8"]
    assert scaled < LARGEST["fp8_scaled"]
    assert error(build(path, **SCALED, fp8_fast=True), case) < LARGEST["fp8_fast"]
    int8 = error(build(path, **INT8), case)
    assert int8 < LARGEST["int8"]
    assert int8 < error(build(path, **INT8, int8_ffn2=True), case) < LARGEST["int8_ffn2"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files(dtype: torch.dtype, tmp_path: Path) -> None:
    case = load_case("wan21_t2v")
    path = file_of(case, tmp_path, {key: tensor.to(dtype) for key, tensor in case.state_dict().items()})
    assert error(build(path), case) < 0.01
    for weights in (FP8, SCALED, INT8):
        model = build(path, **weights)
        assert error(model, case) < 0.015
        stored = {p.dtype for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")}
        assert all(each.itemsize == 1 for each in stored - {dtype}) and stored != {dtype}
        assert model.head.head.weight.dtype == model.blocks[0].norm3.weight.dtype == dtype
        assert model.blocks[0].modulation.dtype == dtype


def test_plain_fp8_file(tmp_path: Path) -> None:
    case = load_case("wan21_t2v")
    path = file_of(case, tmp_path, {key: tensor.to(torch.float8_e4m3fn) for key, tensor in case.state_dict().items()})
    model = build(path, **FP8)
    assert model.blocks[0].ffn[2].weight.dtype is torch.float8_e4m3fn
    assert model.patch_embedding.weight.dtype is torch.bfloat16
    assert error(model, case) < 0.05
    assert error(build(path, **INT8), case) < 0.05
    variant = VARIANTS["t2v-1.3B"]
    assert check_model(settings_of(path, **FP8), variant, CPU) is not None  # of another size: a warning
    with pytest.raises(InputError, match=r"fp8 file without scales.*omit --fp8_scaled"):
        check_model(settings_of(path, **SCALED), variant, CPU)
    with pytest.raises(InputError, match=r"is an fp8 file: add --fp8_base"):
        check_model(settings_of(path), variant, CPU)


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_fp8_file(name: str, prefix: str, tmp_path: Path) -> None:
    case = load_case("wan21_t2v")
    tensors = scaled_file(case.state_dict(), name, prefix)
    tensors[f"{prefix}scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    tensors[f"{prefix}blocks.0.ffn.0.scale_input"] = torch.ones(())
    tensors[f"{prefix}blocks.0.ffn.0.comfy_quant"] = torch.zeros(30, dtype=torch.uint8)
    path = file_of(case, tmp_path, tensors)
    assert check_model(settings_of(path, **SCALED), VARIANTS["t2v-1.3B"], CPU) is not None
    for weights in (FP8, SCALED, {**SCALED, "fp8_fast": True}):
        model = build(path, **weights)
        kept = model.blocks[0].self_attn.q
        assert torch.equal(
            kept.weight.view(torch.uint8), tensors[f"{prefix}blocks.0.self_attn.q.weight"].view(torch.uint8)
        )
        assert kept.scale_weight.shape == (1, 1, 1)
        assert model.text_embedding[0].weight.dtype is torch.bfloat16
        assert error(model, case) < 0.05
    assert error(build(path, **INT8), case) < 0.05


@pytest.mark.parametrize("block", [0, 1])
def test_fp8_file_with_a_block_in_half_precision(block: int, tmp_path: Path) -> None:
    """Which block that is makes no difference: codes are kept, and so are the numbers that the file keeps wide."""
    case = load_case("wan21_t2v")
    wide, tensors = case.state_dict(), scaled_file(case.state_dict())
    for key in [key for key in tensors if key.startswith(f"blocks.{block}.") and key.endswith("scale_weight")]:
        weight = key.replace("scale_weight", "weight")
        tensors[weight] = wide[weight].half()
        del tensors[key]
    path = file_of(case, tmp_path, tensors)
    with pytest.raises(InputError, match=r"is an fp8 file: add --fp8_base"):
        check_model(settings_of(path), VARIANTS["t2v-1.3B"], CPU)
    for weights in (FP8, SCALED):
        model = build(path, **weights)
        assert model.blocks[block].self_attn.q.weight.dtype is torch.float16
        kept = model.blocks[1 - block].self_attn.q.weight.view(torch.uint8)
        assert torch.equal(kept, tensors[f"blocks.{1 - block}.self_attn.q.weight"].view(torch.uint8))


def test_fp8_products_take_e4m3_of_whole_tiles_only(tmp_path: Path) -> None:
    """CUDA refuses other codes and other sides, a CPU takes them: such matrices are rounded anew."""
    case = load_case("wan21_t2v")
    fast = {**SCALED, "fp8_fast": True}
    tensors = scaled_file(case.state_dict())
    model = build(file_of(case, tmp_path, tensors), **fast)
    assert type(model.blocks[0].self_attn.q) is Fp8Linear
    header = read_header(str(tmp_path / "dit.safetensors"))
    shapes = official_shapes(header.shapes)
    settings = FastWeightSettings(**fast)
    q, scale = "blocks.0.self_attn.q", torch.ones(1, 1, 1)
    plan = plan_storage(header, {**block_matrices(shapes), q: (96, 100)}, {q: scale}, settings)
    assert plan.schemes[q].linear is Linear
    e5m2 = {k: t.to(torch.float8_e5m2) if t.dtype is torch.float8_e4m3fn else t for k, t in tensors.items()}
    model = build(file_of(case, tmp_path, e5m2), **fast)
    assert model.blocks[0].self_attn.q.weight.dtype is torch.float8_e4m3fn
    assert error(model, case) < 0.15  # e5m2 itself errs by a tenth


def test_musubi_scales_of_64_inputs(tmp_path: Path) -> None:
    """A file with a scale for every 64 inputs, (out, groups, 1), and one for each output, (out, 1)."""
    case = load_case("wan21_t2v")
    tensors = case.state_dict()
    groups = tensors["blocks.0.ffn.2.weight"].unflatten(1, (5, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 448
    tensors["blocks.0.ffn.2.weight"] = (groups / scale).flatten(1).to(torch.float8_e4m3fn)
    tensors["blocks.0.ffn.2.scale_weight"] = scale
    rows = tensors["blocks.0.self_attn.q.weight"]
    tensors["blocks.0.self_attn.q.weight"] = (rows / 2).to(torch.float8_e4m3fn)
    tensors["blocks.0.self_attn.q.scale_weight"] = torch.full((len(rows), 1), 2.0)
    model = build(file_of(case, tmp_path, tensors), **FP8)
    assert model.blocks[0].ffn[2].scale_weight.shape == (96, 5, 1)
    assert model.blocks[0].self_attn.q.scale_weight.shape == (96, 1, 1)
    assert error(model, case) < 0.02


def test_scale_that_does_not_fit(tmp_path: Path) -> None:
    case = load_case("wan21_t2v")
    tensors = scaled_file(case.state_dict())
    tensors["blocks.1.ffn.0.scale_weight"] = torch.ones(7)
    path = file_of(case, tmp_path, tensors)
    for refuse in (build, lambda path, **weights: check_model(settings_of(path, **weights), VARIANTS["t2v-1.3B"], CPU)):
        with pytest.raises(InputError, match=r"blocks\.1\.ffn\.0 has shape \[7\], which does not fit its matrix \["):
            refuse(path, **FP8)


@pytest.mark.parametrize("weights", [FP8, SCALED, INT8])
def test_a_scaled_file_that_lacks_a_scale(weights: dict[str, bool], tmp_path: Path) -> None:
    """Its codes would be taken for weights, hundreds of times too large."""
    case = load_case("wan21_t2v")
    tensors = scaled_file(case.state_dict())
    del tensors["blocks.1.ffn.0.scale_weight"]
    path = file_of(case, tmp_path, tensors)
    with pytest.raises(InputError, match=r"has no scale for the 8-bit weight blocks\.1\.ffn\.0\.weight"):
        check_model(settings_of(path, **weights), VARIANTS["t2v-1.3B"], CPU)


@pytest.mark.parametrize("weights", [FP8, SCALED, INT8])
def test_lora_is_merged_before_rounding(weights: dict[str, bool], tmp_path: Path) -> None:
    """Merging into codes would lose what a LoRA adds, or multiply it by the scales."""
    case = load_case("wan21_t2v_lora")
    path, lora = file_of(case, tmp_path), str(tmp_path / "lora.safetensors")
    save_file(lora_file(case), lora)
    assert error(build(path, (WeightedLora(lora),), **weights), case) < 0.015
    model = build(path, (WeightedLora(lora, 0.0),), **weights)
    plain = build(path, **weights)
    assert torch.equal(*(each.blocks[0].ffn[0].weight.view(torch.uint8) for each in (model, plain)))


def test_lora_on_an_fp8_file_gets_scales_of_its_own(tmp_path: Path) -> None:
    case = load_case("wan21_t2v_lora")
    path, lora = file_of(case, tmp_path, scaled_file(case.state_dict())), str(tmp_path / "lora.safetensors")
    deltas = lora_file(case)
    some = {key: tensor for key, tensor in deltas.items() if "blocks_0_" in key}
    save_file(some, lora)
    model = build(path, (WeightedLora(lora),), **SCALED)
    assert model.blocks[0].self_attn.q.scale_weight.shape == (96, 1, 1)
    assert model.blocks[1].self_attn.q.scale_weight.shape == (1, 1, 1)


@pytest.mark.parametrize("weights", [FP8, SCALED, INT8])
def test_adapter_gradients_on_a_quantised_base(weights: dict[str, bool], tmp_path: Path) -> None:
    """The gradients of a LoRA on the stored weights are close to those on the exact ones."""
    case = load_case("wan21_t2v_lora")
    path = file_of(case, tmp_path)
    gradients = []
    for each in ({}, weights):
        model = build(path, **each)
        create(model, NetworkSettings(network_dim=4)).load(lora_file(case))
        run(model, case).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert relative_error(gradients[1], gradients[0]) < 0.08


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("computing", [None, torch.float16, torch.bfloat16, torch.float32])
def test_attention_is_tried_in_the_dtype_that_it_will_see(
    stored: torch.dtype, computing: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU may have kernels for float16 alone."""
    tried: list[torch.dtype] = []
    monkeypatch.setattr("wan_train.assemble.check_attention", lambda _, *, dtype, **more: tried.append(dtype))
    case = load_case("wan21_t2v")
    path = file_of(case, tmp_path, {key: tensor.to(stored) for key, tensor in case.state_dict().items()})
    check_model(settings_of(path), VARIANTS["t2v-1.3B"], torch.device("cuda"), computing=computing)
    assert tried == [computing or stored]


def test_files_that_cannot_serve(tmp_path: Path) -> None:
    case = load_case("wan21_t2v")
    tensors = {k: t.to(torch.int8) if t.ndim == 2 else t for k, t in case.state_dict().items()}
    path = file_of(case, tmp_path, tensors)
    with pytest.raises(InputError, match=r"matrices as torch\.int8: give a bf16, fp16, fp32 or fp8 file"):
        check_model(settings_of(path), VARIANTS["t2v-1.3B"], CPU)
    for wrong in ({"fp8_scaled": True}, {"fp8_base": True, "int8_base": True}, {"int8_ffn2": True}, {"fp8_fast": True}):
        with pytest.raises(InputError, match="--"):
            FastWeightSettings(**wrong)
