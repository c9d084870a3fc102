"""A checkpoint with LoRA files merged in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from generate.merged import check_merged, save_merged_model
from tests.tiny.make import DIT
from tests.unit.generate.conftest import Given
from wan_train.errors import InputError
from wan_train.models.loading import load_dit


@pytest.fixture
def lora(models: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    rows = {}
    for name in ("blocks_0_self_attn_q", "blocks_1_ffn_0"):
        out, width = load_file(models / DIT)[name.replace("_", ".").replace("self.attn", "self_attn") + ".weight"].shape
        rows[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, width) * 0.1
        rows[f"lora_unet_{name}.lora_up.weight"] = torch.randn(out, 2) * 0.1
        rows[f"lora_unet_{name}.alpha"] = torch.tensor(4.0)
    save_file(rows, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def merge(given: Given, path: Path, *words: object) -> dict[str, torch.Tensor]:
    settings = given("--save_merged_model", path, *words)
    save_merged_model(settings, check_merged(settings, str(path)), str(path))
    return load_file(path)


def test_the_checkpoint_is_the_model_plus_the_lora(given: Given, lora: Path, models: Path, tmp_path: Path) -> None:
    before = load_file(models / DIT)
    after = merge(given, tmp_path / "m.safetensors", "--lora_weight", lora, "--lora_multiplier", 0.5)
    assert after.keys() == before.keys()
    factors = load_file(lora)
    for name, tensor in before.items():
        assert after[name].dtype is tensor.dtype
        key = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        if f"{key}.alpha" in factors:
            delta = factors[f"{key}.lora_up.weight"] @ factors[f"{key}.lora_down.weight"]
            assert torch.equal(after[name], (tensor.float() + 0.5 * 2 * delta).to(tensor.dtype))
        else:
            assert torch.equal(after[name], tensor)
    load_dit(tmp_path / "m.safetensors")


def test_a_file_of_eight_bits_becomes_one_of_sixteen(given: Given, lora: Path, models: Path, tmp_path: Path) -> None:
    narrow = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 and name.startswith("blocks") else tensor
        for name, tensor in load_file(models / DIT).items()
    }
    save_file(narrow, tmp_path / "fp8.safetensors")
    after = merge(given, tmp_path / "m.safetensors", "--lora_weight", lora, "--dit", tmp_path / "fp8.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert torch.equal(after["blocks.1.self_attn.k.weight"], narrow["blocks.1.self_attn.k.weight"].bfloat16())


def test_patterns_choose_what_is_merged(given: Given, lora: Path, models: Path, tmp_path: Path) -> None:
    before = load_file(models / DIT)
    after = merge(given, tmp_path / "m.safetensors", "--lora_weight", lora, "--exclude_patterns", "ffn")
    assert torch.equal(after["blocks.1.ffn.0.weight"], before["blocks.1.ffn.0.weight"])
    assert not torch.equal(after["blocks.0.self_attn.q.weight"], before["blocks.0.self_attn.q.weight"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "requires --lora_weight"),
        (("--lora_weight", "absent.safetensors"), "absent"),
        (("--dit", ""), "--dit is missing"),
    ],
)
def test_what_cannot_be_merged_is_refused(words: tuple[object, ...], told: str, given: Given, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        check_merged(given(*words), str(tmp_path / "m.safetensors"))
    with pytest.raises(InputError, match=r"must end in \.safetensors"):
        check_merged(given(*words), str(tmp_path / "m.pth"))


def test_what_is_read_is_not_written_over(given: Given, lora: Path, models: Path, tmp_path: Path) -> None:
    (tmp_path / "link.safetensors").symlink_to(models / DIT)
    for path in (models / DIT, lora, tmp_path / "link.safetensors"):
        with pytest.raises(InputError, match="overwrite an input file"):
            check_merged(given("--lora_weight", lora), str(path))
    (tmp_path / "m.safetensors").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_merged(given("--lora_weight", lora), str(tmp_path / "m.safetensors"))


def test_a_name_that_is_too_long_is_refused_before_anything_is_read(given: Given, lora: Path, tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250 + ".safetensors")
    settings = given("--save_merged_model", path, "--lora_weight", lora)
    with pytest.raises(InputError, match=r"too long .* a shorter --save_merged_model"):
        check_merged(settings, str(path))
