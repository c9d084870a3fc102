"""extract_lora.py as a user calls it."""

import pytest
import torch

from networks.formats.files import read_lora
from networks.merge import merged
from networks.settings import EXTRACT
from networks.tools.extract import truncate
from tests.tiny.make import dit_shapes, draw_weight
from wan_train.cli import run
from wan_train.models.weights import diffusers_name
from wan_train.storage import read_header, read_tensors, save_tensors

CPU = torch.device("cpu")


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.safetensors"
    save_tensors(path, {name: draw_weight(name, shape) for name, shape in dit_shapes().items()})
    return path


@pytest.fixture
def tuned(base, tmp_path):
    """Every matrix of attention and FFN changed in full rank."""
    generator = torch.Generator().manual_seed(1)
    path = tmp_path / "tuned.safetensors"
    save_tensors(
        path,
        {
            name: t + 0.01 * torch.randn(t.shape, generator=generator)
            if ("attn" in name or "ffn" in name) and t.ndim == 2
            else t
            for name, t in read_tensors(base)
        },
    )
    return path


def extract(base, tuned, output, *more) -> int:
    return run(EXTRACT, ["--base", str(base), "--tuned", str(tuned), "--output", str(output), *map(str, more)])


def merge(base, lora) -> dict[str, torch.Tensor]:
    names = [name.removesuffix(".weight") for name in read_header(base).shapes]
    return dict(merged(read_tensors(base), [(read_lora(lora, names), 1.0)]))


def test_extracted_and_merged_again_it_is_the_tuned_model_to_the_printed_share(base, tuned, tmp_path, caplog) -> None:
    lora = tmp_path / "lora.safetensors"
    assert extract(base, tuned, lora, "--rank", 8) == 0
    printed = float(next(m for m in caplog.messages if m.startswith("total")).split("%")[0].split()[-1])
    before, wanted, got = dict(read_tensors(base)), dict(read_tensors(tuned)), merge(base, lora)
    change = sum(float((wanted[name] - before[name]).square().sum()) for name in before)
    left = sum(float((wanted[name] - got[name]).square().sum()) for name in before)
    assert 10 < printed < 95
    assert 100 * (1 - left / change) == pytest.approx(printed, abs=0.01)
    blocks = [message for message in caplog.messages if message.startswith("blocks.")]
    assert len(blocks) == len({name.split(".")[1] for name in before if name.startswith("blocks.")})


def test_at_full_rank_nothing_is_lost(base, tuned, tmp_path) -> None:
    lora = tmp_path / "lora.safetensors"
    assert extract(base, tuned, lora, "--dim", 4096) == 0
    wanted = dict(read_tensors(tuned))
    for name, tensor in merge(base, lora).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)


def test_names_of_diffusers_and_precisions_of_either_file(base, tuned, tmp_path) -> None:
    other, lora, plain = tmp_path / "diffusers.safetensors", tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_tensors(other, {diffusers_name(name): tensor for name, tensor in read_tensors(tuned)})
    assert extract(base, other, lora) == 0
    assert extract(base, tuned, plain) == 0
    assert all(torch.equal(tensor, dict(read_tensors(plain))[name]) for name, tensor in read_tensors(lora))
    half = tmp_path / "half.safetensors"
    save_tensors(half, {name: tensor.bfloat16() for name, tensor in read_tensors(base)})
    assert extract(half, base, tmp_path / "none.safetensors") == 2  # no more than its own rounding


def test_large_matrices_are_decomposed_as_well_as_small_ones() -> None:
    generator = torch.Generator().manual_seed(2)
    spectrum = torch.logspace(0, -3, 300)
    left, _ = torch.linalg.qr(torch.randn(400, 300, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(300, 300, generator=generator))
    change = left * spectrum @ right.T
    best = float(spectrum[16:].square().sum())
    result = truncate(torch.zeros_like(change), change, 16, device=CPU, dtype=torch.float32)
    assert result.left == pytest.approx(best, rel=1e-3)
    state = torch.random.get_rng_state()
    again = truncate(torch.zeros_like(change), change, 16, device=CPU, dtype=torch.float32)
    assert torch.equal(result.delta.up, again.delta.up)
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_no_lora_holds_is_named(base, tmp_path, caplog) -> None:
    path = tmp_path / "tuned.safetensors"
    tensors = dict(read_tensors(base))
    changed = {"blocks.0.self_attn.q.weight", "blocks.0.self_attn.q.bias", "patch_embedding.weight"}
    save_tensors(path, {name: t + 1 if name in changed else t for name, t in tensors.items()})
    assert extract(base, path, tmp_path / "lora.safetensors", "--save_precision", "bf16") == 0
    message = next(m for m in caplog.messages if "cannot represent" in m)
    assert "blocks.0.self_attn.q.bias" in message
    assert "patch_embedding.weight" in message
    dtypes = read_header(tmp_path / "lora.safetensors").dtypes
    assert dtypes["lora_unet_blocks_0_self_attn_q.lora_up.weight"] == torch.bfloat16


def test_bad_input_is_one_line(base, tuned, tmp_path, capsys) -> None:
    lora = tmp_path / "lora.safetensors"
    eight, less = tmp_path / "eight.safetensors", tmp_path / "less.safetensors"
    save_tensors(eight, {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in read_tensors(base)})
    save_tensors(less, {n: t for n, t in read_tensors(base) if "blocks.1" not in n})
    for before, after, output, wanted in (
        (base, base, lora, "nothing to extract"),
        (eight, tuned, lora, "8 bits"),
        (base, less, lora, "only one of"),
        (base, tuned, base, "is one of the checkpoints"),
        (base, tuned, tmp_path / "lora.pt", "ends in .safetensors"),
        (base, tmp_path / "no.safetensors", lora, "no such file"),
    ):
        assert extract(before, after, output) == 2
        said = capsys.readouterr().err.strip()
        assert wanted in said
        assert "Traceback" not in said
    assert not lora.exists()
