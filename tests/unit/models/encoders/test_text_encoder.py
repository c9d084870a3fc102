import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.parity.golden import DATA, load_case, load_manifest, relative_error
from wan_train.errors import InputError
from wan_train.models.encoders.text import TextEncoder, check_text_encoder, load_text_encoder
from wan_train.models.encoders.text_files import t5_rename

WEIGHTS = load_case("umt5").state_dict()  # official names, 300 tokens, dim 64
TOKENIZER = DATA / "tokenizer"
TEXTS = ["a cat runs across the grass", "rain", "a press crushes chocolate cookies on a wooden table"]


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    rename = t5_rename({name: tuple(tensor.shape) for name, tensor in state.items()})
    return {rename(name): tensor for name, tensor in state.items()}


def embedded() -> Tensor:
    return torch.frombuffer(bytearray((TOKENIZER / "spiece.model").read_bytes()), dtype=torch.uint8)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return load_text_encoder(WEIGHTS, tokenizer=TOKENIZER)


def test_a_text_gives_a_row_per_token(encoder: TextEncoder) -> None:
    out = encoder(TEXTS)
    assert [tuple(rows.shape) for rows in out] == [(len(ids), 64) for ids in encoder.tokenizer(TEXTS)]
    assert all(rows.dtype is torch.float32 and not rows.requires_grad and rows.is_contiguous() for rows in out)
    assert encoder([]) == []
    assert encoder([""])[0].shape == (1, 64)  # the end token


def test_a_text_does_not_depend_on_its_batch_or_padding(encoder: TextEncoder) -> None:
    for text, rows in zip(TEXTS, encoder(TEXTS), strict=True):
        assert relative_error(rows, encoder([text])[0]) < 1e-5
        ids, mask = torch.zeros(1, 512, dtype=torch.long), torch.zeros(1, 512, dtype=torch.long)
        ids[0, : len(rows)] = torch.tensor(encoder.tokenizer([text])[0])
        mask[0, : len(rows)] = 1
        assert relative_error(rows, encoder.encode_ids(ids, mask)[0, : len(rows)]) < 1e-5


def test_rows_do_not_hold_the_padded_batch(encoder: TextEncoder) -> None:
    assert all(rows.untyped_storage().nbytes() == rows.nbytes for rows in encoder(TEXTS))


def test_one_text_in_place_of_a_list_is_a_mistake(encoder: TextEncoder) -> None:
    with pytest.raises(TypeError, match="list of texts"):
        encoder("a cat")


def test_without_a_tokenizer_only_ids_are_taken() -> None:
    encoder = load_text_encoder(WEIGHTS, tokenizer=None)
    with pytest.raises(InputError, match="tokenizer"):
        encoder(["a cat"])
    assert encoder.encode_ids(torch.tensor([[5, 1]]), torch.ones(1, 2)).shape == (1, 2, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_stay_so_and_compute_in_float32(dtype: torch.dtype) -> None:
    half = {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}
    stored = load_text_encoder(half, tokenizer=TOKENIZER)
    twin = load_text_encoder(half, tokenizer=TOKENIZER, dtype=torch.float32)
    assert {p.dtype for p in stored.parameters() if p.ndim > 1} == {dtype}
    assert {p.dtype for p in twin.parameters()} == {torch.float32}
    assert stored.model.shared.weight.dtype is dtype  # and not the whole table widened at each use
    for ours, theirs in zip(stored(TEXTS), twin(TEXTS), strict=True):
        assert ours.dtype is torch.float32
        assert relative_error(ours, theirs) < 1e-5
    converted = load_text_encoder(WEIGHTS, tokenizer=TOKENIZER, dtype=dtype)
    assert torch.equal(converted(TEXTS)[0], stored(TEXTS)[0])


@pytest.mark.gpu
def test_an_accelerator_computes_as_stored(encoder: TextEncoder) -> None:
    there = load_text_encoder(WEIGHTS, tokenizer=TOKENIZER, device="cuda", dtype=torch.bfloat16)
    for ours, theirs in zip(there(TEXTS), encoder(TEXTS), strict=True):
        assert ours.dtype is torch.bfloat16 and ours.device.type == "cuda"
        assert relative_error(ours.cpu(), theirs) < 0.05


def test_plain_eight_bit_weights_become_bfloat16() -> None:
    eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in WEIGHTS.items()}
    encoder = load_text_encoder(eight, tokenizer=None)
    assert {p.dtype for p in encoder.parameters() if p.ndim > 1} == {torch.bfloat16}


@pytest.mark.parametrize("naming", ["official", "prefixed", "transformers", "twice", "tied only", "comfy"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_every_naming_gives_the_same_model(encoder: TextEncoder, tmp_path: Path, naming: str, suffix: str) -> None:
    foreign = to_transformers(WEIGHTS)
    table = foreign["shared.weight"]
    rest = {name: tensor for name, tensor in foreign.items() if name != "shared.weight"}
    state = {
        "official": WEIGHTS,
        "prefixed": {f"encoder.{name}": tensor for name, tensor in WEIGHTS.items()},
        "transformers": foreign,
        "twice": {**foreign, "encoder.embed_tokens.weight": table.clone()},
        "tied only": {**rest, "encoder.embed_tokens.weight": table},
        "comfy": {**foreign, "spiece_model": embedded()},
    }[naming]
    path = tmp_path / f"t5.{suffix}"
    if suffix == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    tokenizer = "auto" if naming == "comfy" else TOKENIZER
    check_text_encoder(path, tokenizer)
    loaded = load_text_encoder(path, tokenizer=tokenizer)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for ours, theirs in zip(loaded(TEXTS), encoder(TEXTS), strict=True):
        assert torch.equal(ours, theirs)


def test_shards_load_as_one_file(encoder: TextEncoder, tmp_path: Path) -> None:
    names = list(WEIGHTS)
    for index, part in enumerate((names[:9], names[9:]), 1):
        save_file({name: WEIGHTS[name] for name in part}, tmp_path / f"model-0000{index}-of-00002.safetensors")
    loaded = load_text_encoder(tmp_path, tokenizer=TOKENIZER)
    assert torch.equal(loaded(TEXTS)[0], encoder(TEXTS)[0])


def test_the_tokenizer_beside_the_file_is_found(encoder: TextEncoder, tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "t5.safetensors")
    folder = tmp_path / "google" / "umt5-xxl"
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes((TOKENIZER / "spiece.model").read_bytes())
    check_text_encoder(tmp_path / "t5.safetensors")
    assert torch.equal(load_text_encoder(tmp_path / "t5.safetensors")(TEXTS)[0], encoder(TEXTS)[0])


def test_no_tokenizer_anywhere_is_an_error_before_loading(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "t5.safetensors")
    for look in (check_text_encoder, load_text_encoder):
        with pytest.raises(InputError, match="google/umt5-xxl"):
            look(tmp_path / "t5.safetensors")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused() -> None:
    small = {**WEIGHTS, "token_embedding.weight": WEIGHTS["token_embedding.weight"][:100]}
    with pytest.raises(InputError, match="134 tokens"):
        load_text_encoder(small, tokenizer=TOKENIZER)


CHANGED = "blocks.7.attn.q.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop(CHANGED), "missing encoder.block.7.layer.0.SelfAttention.q.weight"),
        (lambda state: state.update({CHANGED + "s": state.pop(CHANGED)}), "unexpected .*7.*weights"),
        (
            lambda state: state.update({CHANGED: state[CHANGED][1:]}),
            "misshapen encoder.block.7.layer.0.SelfAttention.q",
        ),
        (lambda state: state.pop("token_embedding.weight"), "missing shared.weight"),
        (lambda state: state.update({"decoder.x": state[CHANGED]}), "unexpected decoder.x"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, complaint: str) -> None:
    state = {name: torch.empty(shape, device="meta") for name, shape in load_manifest("umt5-xxl-encoder").items()}
    change(state)
    for look in (check_text_encoder, load_text_encoder):
        with pytest.raises(InputError, match=complaint) as caught:
            look(state, tokenizer=None)
        assert str(caught.value).count(";") <= 1


def test_a_duplicate_of_another_shape_is_refused() -> None:
    state = to_transformers(WEIGHTS)
    with pytest.raises(InputError, match=r"unexpected encoder\.embed_tokens\.weight"):
        check_text_encoder({**state, "encoder.embed_tokens.weight": torch.zeros(2, 64)}, None)


def test_a_wrong_file_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"head.modulation": torch.zeros(1, 2, 8)}, tmp_path / "dit.safetensors")
    with pytest.raises(InputError, match=r"--t5 .*dit\.safetensors is a Wan DiT, not a T5"):
        check_text_encoder(tmp_path / "dit.safetensors")
    with pytest.raises(InputError, match=r"absent\.pth"):
        check_text_encoder(tmp_path / "absent.pth")


LOAD = """
import sys, torch
from tests.unit.models.peak import tell_peak
from wan_train.models.encoders.text import load_text_encoder

path, small, wanted = sys.argv[1:]
tell_peak(
    lambda: load_text_encoder(torch.load(small), tokenizer=None),
    lambda: load_text_encoder(path, tokenizer=None, dtype=torch.bfloat16, fp8=wanted == "fp8"),
)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("stored", "wanted", "least", "most"),
    [(torch.float32, "bfloat16", 5e8, 1.05), (torch.bfloat16, "fp8", 3.5e8, 1.2)],  # some matrices wide at a time
)
def test_loading_holds_nothing_twice(
    tmp_path: Path, root: Path, stored: torch.dtype, wanted: str, least: float, most: float
) -> None:
    """A checkpoint of more than 1 GB in float32, loaded in fewer bits."""
    dim, ffn, layers = 1024, 2816, 18
    shapes = {"token_embedding.weight": (60000, dim), "norm.weight": (dim,)}
    for i in range(layers):
        shapes |= {f"blocks.{i}.attn.{x}.weight": (dim, dim) for x in "qkvo"}
        shapes |= {f"blocks.{i}.{name}.weight": (ffn, dim) for name in ("ffn.gate.0", "ffn.fc1")}
        shapes |= {f"blocks.{i}.ffn.fc2.weight": (dim, ffn), f"blocks.{i}.pos_embedding.embedding.weight": (32, 16)}
        shapes |= {f"blocks.{i}.norm1.weight": (dim,), f"blocks.{i}.norm2.weight": (dim,)}
    save_file({name: torch.randn(shape, dtype=stored) for name, shape in shapes.items()}, tmp_path / "t5.safetensors")
    assert (tmp_path / "t5.safetensors").stat().st_size > 1e9 / 4 * stored.itemsize
    torch.save(WEIGHTS, tmp_path / "small.pt")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "t5.safetensors"), str(tmp_path / "small.pt"), wanted]
    ratio, size = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert float(size) > least
    assert float(ratio) <= most
