"""Prompts to conditions, with the text encoder in bf16 and in fp8."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.golden import DATA, load_case, relative_error
from wan_train.models.encoders.text import load_text_encoder
from wan_train.models.settings import TextEncoderSettings
from wan_train.sampling import encode
from wan_train.sampling.encode import encode_texts

CPU = torch.device("cpu")


@pytest.fixture
def t5(tmp_path: Path) -> str:
    state = {name: tensor.bfloat16() for name, tensor in load_case("umt5").state_dict().items()}
    save_file(state, tmp_path / "t5.safetensors")
    return str(tmp_path / "t5.safetensors")


def test_every_text_is_encoded_once_and_lies_in_main_memory(t5: str) -> None:
    found = encode_texts(["a cat", "blur", "rain", "blur"], settings(t5), CPU)
    assert set(found) == {"a cat", "rain", "blur"}
    encoder = load_text_encoder(t5, tokenizer=DATA / "tokenizer")
    for text, conditions in found.items():
        assert torch.equal(conditions.context[0], encoder([text])[0])


def test_fp8_t5_encodes_in_fp8_and_nearly_the_same(t5: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def load(*given: object, **options: object) -> object:
        made.append(load_text_encoder(*given, **options))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(encode, "load_text_encoder", load)
    plain, eight = (
        encode_texts(["a cat runs", ""], settings(t5, fp8_t5=fp8), CPU)["a cat runs"].context[0]
        for fp8 in (False, True)
    )
    assert [any(p.dtype is torch.float8_e4m3fn for p in encoder.parameters()) for encoder in made] == [False, True]
    assert plain.dtype is eight.dtype
    assert 0 < relative_error(eight, plain) < 0.2


def settings(t5: str, *, fp8_t5: bool = False) -> TextEncoderSettings:
    return TextEncoderSettings(t5=t5, tokenizer=str(DATA / "tokenizer"), fp8_t5=fp8_t5)
