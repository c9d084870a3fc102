"""Our text encoder against the official one's stored outputs, transformers' and the published names."""

import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from tests.parity.golden import TOLERANCE, load_case, load_manifest, relative_error
from wan_train.models.encoders.text import check_text_encoder, load_text_encoder
from wan_train.models.encoders.text_files import t5_rename

CASE = load_case("umt5")


def test_encodes_as_the_official_model() -> None:
    encoder = load_text_encoder(CASE.state_dict(), tokenizer=None)
    mask = CASE.outputs["mask"]
    encoded = encoder.encode_ids(CASE.outputs["ids"], mask)
    assert encoded.shape == (*mask.shape, CASE.spec["config"]["dim"])
    assert relative_error(encoded[mask.bool()], CASE.outputs["out"]) < TOLERANCE


def test_a_transformers_state_gives_what_transformers_computes() -> None:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=120, d_model=48, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
    theirs = UMT5EncoderModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    state = theirs.state_dict()
    assert "encoder.embed_tokens.weight" in state  # the duplicate that has to be tolerated
    ids = torch.randint(2, 120, (3, 150))  # far beyond the largest distance that has a bucket of its own
    mask = (torch.arange(150) < torch.tensor([[150], [97], [1]])).long()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    encoded = load_text_encoder(state, tokenizer=None).encode_ids(ids, mask)
    assert relative_error(encoded[mask.bool()], expected[mask.bool()]) < TOLERANCE


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_the_published_file_fits(prefix: str) -> None:
    manifest = load_manifest("umt5-xxl-encoder")
    check_text_encoder({prefix + name: torch.empty(shape, device="meta") for name, shape in manifest.items()}, None)


def test_the_transformers_names_are_those_of_transformers() -> None:
    manifest = load_manifest("umt5-xxl-encoder")
    rename = t5_rename(manifest)
    config = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    with torch.device("meta"):
        theirs = {name: tuple(tensor.shape) for name, tensor in UMT5EncoderModel(config).state_dict().items()}
    ours = {rename(name): shape for name, shape in manifest.items()}
    assert theirs.pop("encoder.embed_tokens.weight") == ours["shared.weight"]
    assert ours == theirs
