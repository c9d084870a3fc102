"""convert_lora.py as a user calls it."""

import os

import pytest
import torch
from safetensors import safe_open

from networks.formats.files import kohya_state, read_lora
from networks.formats.hashes import add_hashes
from networks.formats.keys import possible_modules
from networks.settings import TOOL
from wan_train.cli import run
from wan_train.models.weights import diffusers_name
from wan_train.storage import read_header, read_tensors, save_tensors


def convert(source, output, target: str, *more: str) -> int:
    return run(TOOL, ["--input", str(source), "--output", str(output), "--target", target, *more])


def names(path) -> set[str]:
    return set(read_header(path).shapes)


def products(path, model) -> dict[str, torch.Tensor]:
    """What each matrix gains, in float64."""
    modules = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    read = read_lora(path, modules)
    return {name: d.scale * d.up.double() @ d.down.double() for name, d in read.items()}


def assert_same_change(path, other, model, tolerance: float = 1e-6) -> None:
    ours, theirs = products(path, model), products(other, model)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)


@pytest.fixture
def kohya(make_model, make_deltas, tmp_path):
    path = tmp_path / "kohya.safetensors"
    save_tensors(
        path,
        kohya_state(make_deltas(make_model(image=True), rank=3, alpha=1.7)),
        {"ss_network_dim": "3", "note": "kept"},
    )
    return path


def test_there_and_back_changes_no_product(kohya, tmp_path, make_model) -> None:
    other, back = tmp_path / "other.safetensors", tmp_path / "back.safetensors"
    assert convert(kohya, other, "other") == 0
    assert convert(other, back, "default") == 0
    model = make_model(image=True)
    assert_same_change(kohya, other, model)
    assert_same_change(kohya, back, model)
    assert names(back) == names(kohya)
    assert names(other) == {
        f"diffusion_model.{module}.lora_{half}.weight" for module in products(kohya, model) for half in "AB"
    }
    assert {float(t) for name, t in read_tensors(back) if name.endswith("alpha")} == {3.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays_and_a_power_of_two_costs_no_precision(make_model, make_deltas, tmp_path, dtype) -> None:
    model = make_model()
    state = kohya_state(make_deltas(model, rank=32, alpha=1.0))
    path, other = tmp_path / "half.safetensors", tmp_path / "other.safetensors"
    save_tensors(path, {name: tensor.to(dtype) for name, tensor in state.items()})
    assert convert(path, other, "other") == 0
    assert set(read_header(other).dtypes.values()) == {dtype}
    assert_same_change(path, other, model, tolerance=0.0 if dtype == torch.bfloat16 else 1e-6)


def test_diffusers_names_become_official(make_model, make_deltas, tmp_path) -> None:
    model = make_model(image=True)
    path, other = tmp_path / "diffusers.safetensors", tmp_path / "kohya.safetensors"
    state = {}
    for module, delta in make_deltas(model).items():
        state[f"transformer.{diffusers_name(module)}.lora_A.weight"] = delta.down
        state[f"transformer.{diffusers_name(module)}.lora_B.weight"] = delta.up
    save_tensors(path, state, {"lora_adapter_metadata": '{"transformer.lora_alpha": 6, "transformer.r": 3}'})
    assert convert(path, other, "default") == 0
    assert "lora_unet_blocks_1_cross_attn_v_img.lora_up.weight" in names(other)
    assert_same_change(path, other, model)
    assert convert(path, tmp_path / "peft.safetensors", "other") == 0
    assert_same_change(path, tmp_path / "peft.safetensors", model)


def test_prefix(kohya, tmp_path) -> None:
    for prefix, start in (
        ("transformer", "transformer.blocks."),
        ("transformer.", "transformer.blocks."),
        ("", "blocks."),
    ):
        assert convert(kohya, tmp_path / "out.safetensors", "other", "--diffusers_prefix", prefix) == 0
        assert all(name.startswith(start) for name in names(tmp_path / "out.safetensors"))


@pytest.mark.parametrize("target", ["other", "default"])
def test_a_file_in_the_target_form_is_written_through(kohya, tmp_path, capsys, target: str) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert convert(kohya, first, target) == 0
    capsys.readouterr()
    assert convert(first, second, target) == 0
    assert "already" in capsys.readouterr().err
    ours, theirs = dict(read_tensors(first)), dict(read_tensors(second))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_metadata_is_kept_and_hashes_are_those_of_the_new_file(kohya, tmp_path) -> None:
    other = tmp_path / "other.safetensors"
    stale = tmp_path / "stale.safetensors"
    with safe_open(kohya, "pt") as file:
        save_tensors(stale, dict(read_tensors(kohya)), dict(file.metadata()) | {"sshs_model_hash": "0" * 64})
    assert convert(stale, other, "other") == 0
    with safe_open(other, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "3" and metadata["note"] == "kept"
    fresh = add_hashes(dict(read_tensors(other)), {"ss_network_dim": "3"})
    assert metadata["sshs_model_hash"] == fresh["sshs_model_hash"]
    assert metadata["sshs_legacy_hash"] == fresh["sshs_legacy_hash"]


def test_possible_modules_come_from_the_blocks_that_are_named() -> None:
    found = possible_modules(["lora_unet_blocks_39_ffn_0.alpha", "x.vace_blocks.7.after_proj.lora_A.weight"])
    assert "blocks.39.cross_attn.k_img" in found and "vace_blocks.7.after_proj" in found and "head.head" in found
    assert not any(name.startswith(("blocks.0", "blocks.7", "vace_blocks.39")) for name in found)


def test_bad_input_is_one_line_and_exit_code_2(kohya, tmp_path, capsys) -> None:
    out = tmp_path / "out.safetensors"
    broken, foreign, link = (
        tmp_path / "broken.safetensors",
        tmp_path / "foreign.safetensors",
        tmp_path / "link.safetensors",
    )
    broken.write_bytes(kohya.read_bytes()[:-8])
    save_tensors(foreign, {"weight": torch.ones(1)})
    os.symlink(kohya, link)
    cases = [
        ((tmp_path / "none.safetensors", out, "other"), "no such file"),
        ((broken, out, "other"), "not a complete safetensors file"),
        ((foreign, out, "other"), "is not a LoRA"),
        ((kohya, tmp_path / "out.pt", "other"), ".safetensors"),
        ((kohya, kohya, "other"), "is the input"),
        ((kohya, link, "other"), "is the input"),
        ((kohya, out, "elsewhere"), "elsewhere"),
        ((kohya, kohya / "out.safetensors", "other"), "cannot write"),
    ]
    for arguments, message in cases:
        assert convert(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not out.exists()
