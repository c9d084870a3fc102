"""Prompts to conditions, with the text encoder in bf16 and in fp8."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.golden import DATA, load_case, relative_error
from tests.tiny.make import dit_shapes, save
from wan_train.errors import InputError
from wan_train.models.encoders.text import load_text_encoder
from wan_train.models.settings import DitSettings, ImageEncoderSettings, InitSettings, TextEncoderSettings
from wan_train.models.variants import VARIANTS
from wan_train.sampling import encode
from wan_train.sampling.encode import check_given_clip, encode_texts

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


def test_layers_that_init_control_adds_read_the_image_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "t2v.safetensors", dit_shapes(), torch.bfloat16)
    monkeypatch.setattr(encode, "check_image_encoder", lambda path: 1280)
    task, clip = "fun-control-1.3B", ImageEncoderSettings(clip="clip.safetensors")
    dit = DitSettings(task=task, dit=str(tmp_path / "t2v.safetensors"))
    check_given_clip(clip, VARIANTS[task], dit, InitSettings(init_control="auto"))
    with pytest.raises(InputError, match="expects 0: give the image encoder"):
        check_given_clip(clip, VARIANTS[task], dit)


def settings(t5: str, *, fp8_t5: bool = False) -> TextEncoderSettings:
    return TextEncoderSettings(t5=t5, tokenizer=str(DATA / "tokenizer"), fp8_t5=fp8_t5)
