"""The text encoder in 8 bits: quantised while it loads, and from files that have 8 bits already."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.parity.golden import DATA, load_case, relative_error, state_dict
from wan_train.errors import InputError
from wan_train.models.encoders.text import TextEncoder, check_text_encoder, load_text_encoder
from wan_train.models.encoders.text_files import t5_rename
from wan_train.precision import widened

FP8 = torch.float8_e4m3fn
CASE = load_case("umt5")
WEIGHTS = {name: tensor.bfloat16() for name, tensor in CASE.state_dict().items()}
TOKENIZER = DATA / "tokenizer"
State = dict[str, Tensor]


def encode(state: State | Path, **options: object) -> Tensor:
    """The embeddings of the reference's tokens."""
    return embed(load_text_encoder(state, tokenizer=None, **options))  # type: ignore[arg-type]


def embed(encoder: TextEncoder) -> Tensor:
    mask = CASE.outputs["mask"]
    return encoder.encode_ids(CASE.outputs["ids"], mask)[mask.bool()]


def foreign() -> State:
    """The weights under transformers' names."""
    rename = t5_rename({name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()})
    return {rename(name): tensor for name, tensor in WEIGHTS.items()}


def is_matrix(name: str) -> bool:
    """Whether a tensor, under official or transformers' names, is a Linear's."""
    of_block = ".attn." in name or ".ffn." in name or "DenseReluDense" in name or "SelfAttention" in name
    return of_block and "relative" not in name and name.endswith(".weight")


def spread(tensor: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix, with a scale of this shape: for all of it or for each row."""
    dims = (0, 1) if len(shape) < 1 or shape == (1,) else (1,)
    scale = tensor.float().abs().amax(dims, keepdim=True) / 448
    return (tensor.float() / scale).to(FP8), scale


def scaled_file(state: State, ending: str, shape: Callable[[Tensor], tuple[int, ...]]) -> tuple[State, State]:
    """A scaled fp8 file and the float32 weights that it stands for."""
    stored: State = {}
    meant: State = {}
    for name, tensor in state.items():
        stored[name], meant[name] = tensor, tensor.float()
        if is_matrix(name):
            stored[name], scale = spread(tensor, shape(tensor))
            stored[name.removesuffix("weight") + ending] = scale.reshape(shape(tensor)).clone()
            meant[name] = stored[name].float() * scale
    return stored, meant


def comfy(marker: str, shape: Callable[[Tensor], tuple[int, ...]] = lambda _: ()) -> tuple[State, State]:
    """A scaled file as ComfyUI has it, in its older form with the marker scaled_fp8 or the newer with comfy_quant."""
    stored, meant = scaled_file(foreign(), "scale_weight" if marker == "scaled_fp8" else "weight_scale", shape)
    modules = [name.removesuffix(".weight") for name in stored if is_matrix(name)]
    if marker == "scaled_fp8":
        stored["scaled_fp8"] = torch.zeros(0, dtype=FP8)
        stored |= {f"{module}.scale_input": torch.ones(()) for module in modules}
    else:
        note = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        stored |= {f"{module}.comfy_quant": note.clone() for module in modules}
        stored |= {f"{module}.input_scale": torch.ones(()) for module in modules}
    spiece = bytearray((TOKENIZER / "spiece.model").read_bytes())
    return {**stored, "spiece_model": torch.frombuffer(spiece, dtype=torch.uint8)}, meant


def test_matrices_take_a_byte_a_number_and_the_rest_stays() -> None:
    encoder = load_text_encoder(WEIGHTS, tokenizer=None, fp8=True)
    kept = {name: p for name, p in encoder.model.named_parameters() if p.dtype is FP8}
    assert {name.removesuffix(".weight") for name in kept} == {
        name.removesuffix(".scale_weight") for name, _ in encoder.model.named_buffers()
    }
    assert sorted(p.numel() for p in kept.values()) == sorted(t.numel() for n, t in WEIGHTS.items() if is_matrix(n))
    table = encoder.model.shared.weight
    assert table.dtype is torch.bfloat16 and torch.equal(table, WEIGHTS["token_embedding.weight"])
    assert not any(p.requires_grad for p in encoder.parameters())
    # Of the published model: 4.63e9 numbers in matrices, a float32 scale to every 64.
    codes, scales = sum(p.nbytes for p in kept.values()), sum(b.nbytes for b in encoder.model.buffers())
    assert codes + scales < 0.54 * 2 * codes


@pytest.mark.parametrize(("seed", "bound"), [(None, 0.17), (1, 0.17), (2, 0.17)])
def test_embeddings_are_closer_than_those_of_a_plain_cast(seed: int | None, bound: float) -> None:
    """These tiny models amplify every error: bfloat16 itself errs by 0.02 in them."""
    state = CASE.state_dict() if seed is None else state_dict(CASE.spec["shapes"], seed)
    exact = encode(state)
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    ours = relative_error(encode(state, fp8=True), exact)
    plain = {name: tensor.to(FP8) if tensor.ndim > 1 else tensor for name, tensor in state.items()}
    assert ours < min(bound, 0.9 * relative_error(encode(plain), exact))


def test_it_computes_what_its_codes_and_scales_stand_for() -> None:
    encoder = load_text_encoder(WEIGHTS, tokenizer=None, fp8=True)
    meant = {
        f"{name}.weight": widened(part.weight, part.scale_weight, torch.float32)
        for name, part in encoder.model.named_modules()
        if hasattr(part, "scale_weight")
    }
    assert len(meant) == sum(map(is_matrix, WEIGHTS))
    assert relative_error(embed(encoder), encode({**foreign(), **meant}, dtype=torch.float32)) < 1e-5
    assert embed(encoder).dtype is torch.float32


@pytest.mark.parametrize("naming", ["transformers", "prefixed", "file"])
def test_every_naming_gives_the_same_codes(tmp_path: Path, naming: str) -> None:
    save_file(WEIGHTS, tmp_path / "t5.safetensors")
    state = {
        "transformers": foreign(),
        "prefixed": {f"encoder.{name}": tensor for name, tensor in WEIGHTS.items()},
        "file": tmp_path / "t5.safetensors",
    }[naming]
    assert torch.equal(encode(state, fp8=True), encode(WEIGHTS, fp8=True))


@pytest.mark.parametrize("marker", ["scaled_fp8", "comfy_quant"])
@pytest.mark.parametrize("fp8", [False, True])
def test_comfyui_s_scaled_files_are_read(tmp_path: Path, marker: str, fp8: bool) -> None:
    stored, meant = comfy(marker)
    path = tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    save_file(stored, path)
    check_text_encoder(path)
    encoder = load_text_encoder(path, fp8=fp8)  # with the tokenizer that is in it
    assert encoder(["rain"])[0].shape[1] == 64
    if not fp8:
        assert {p.dtype for p in encoder.parameters() if p.ndim > 1} == {torch.bfloat16}
        assert torch.equal(embed(encoder), encode(meant, dtype=torch.bfloat16))
        return
    assert relative_error(embed(encoder), encode(meant, dtype=torch.float32)) < 1e-5
    for name, parameter in encoder.model.named_parameters():
        if is_matrix(name):
            assert torch.equal(parameter.view(torch.uint8), stored[name].view(torch.uint8))


@pytest.mark.parametrize(
    "shape",
    [lambda _: (1,), lambda t: (len(t),), lambda t: (len(t), 1), lambda t: (len(t), 1, 1)],
    ids=["whole", "rows", "column", "column of blocks"],
)
def test_scales_of_rows_and_of_whole_matrices_are_read(shape: Callable[[Tensor], tuple[int, ...]]) -> None:
    stored, meant = comfy("comfy_quant", shape)
    exact = encode(meant, dtype=torch.float32)
    assert relative_error(encode(stored, dtype=torch.float32), exact) < 1e-6
    assert relative_error(encode(stored, fp8=True), exact) < 1e-5


def test_a_scaled_file_may_have_official_names() -> None:
    stored, meant = scaled_file(WEIGHTS, "scale_weight", lambda t: (len(t), 1, 1))
    exact = encode(meant, dtype=torch.float32)
    assert relative_error(encode(stored, dtype=torch.float32), exact) < 1e-6
    assert relative_error(encode(stored, fp8=True), exact) < 1e-5


def test_a_plain_fp8_file_keeps_its_codes() -> None:
    plain = {name: tensor.to(FP8) if tensor.ndim > 1 else tensor for name, tensor in WEIGHTS.items()}
    encoder = load_text_encoder(plain, tokenizer=None, fp8=True)
    block = encoder.model.encoder.block[1].layer[1].DenseReluDense
    assert torch.equal(block.wo.weight.view(torch.uint8), plain["blocks.1.ffn.fc2.weight"].view(torch.uint8))
    assert encoder.model.shared.weight.dtype is torch.bfloat16
    meant = {name: tensor.float() for name, tensor in plain.items()}
    assert relative_error(embed(encoder), encode(meant)) < 1e-5


QUERY = "encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({f"{QUERY}.weight": torch.zeros(64, 64, dtype=torch.int8)}, "SelfAttention.q.weight as int8: give a bf16"),
        ({f"{QUERY}.weight_scale": torch.zeros(64, 2, dtype=torch.uint8)}, "q.weight_scale as uint8: give a bf16"),
        ({f"{QUERY}.weight_scale": torch.ones(5)}, r"scale of .*SelfAttention\.q"),
        ({f"{QUERY}.weight_scale_2": torch.ones(())}, "unexpected .*weight_scale_2"),
    ],
)
def test_eight_bits_that_are_not_understood_are_refused(change: State, complaint: str) -> None:
    stored = {**comfy("comfy_quant")[0], **change}
    for look in (check_text_encoder, load_text_encoder):
        with pytest.raises(InputError, match=complaint):
            look(stored, tokenizer=None)


@pytest.mark.gpu
def test_an_accelerator_has_the_matrices_and_main_memory_the_table() -> None:
    encoder = load_text_encoder(WEIGHTS, tokenizer=TOKENIZER, device="cuda", dtype=torch.bfloat16, fp8=True)
    places = {name: p.device.type for name, p in [*encoder.model.named_parameters(), *encoder.model.named_buffers()]}
    assert {name for name, place in places.items() if place == "cpu"} == {"shared.weight"}
    here = load_text_encoder(WEIGHTS, tokenizer=TOKENIZER, fp8=True)
    for ours, theirs in zip(encoder(["rain", "a cat"]), here(["rain", "a cat"]), strict=True):
        assert ours.device.type == "cuda" and ours.dtype is torch.bfloat16
        assert relative_error(ours.cpu(), theirs) < 0.05
