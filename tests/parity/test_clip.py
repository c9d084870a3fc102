"""Our image encoder against the official one's stored outputs, transformers' and the published names."""

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.parity.golden import TOLERANCE, load_case, load_manifest, relative_error
from wan_train.errors import InputError
from wan_train.models.encoders.image import check_image_encoder, load_image_encoder

CASE = load_case("clip_vision")
HEADS = {"num_heads": CASE.spec["config"]["num_heads"]}


def image() -> Tensor:
    return CASE.normal("image", (1, 3, *CASE.spec["image"])).tanh()


@pytest.mark.parametrize("prefix", ["", "visual."])
def test_encodes_as_the_official_tower(prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in CASE.state_dict().items()}
    tokens = load_image_encoder(state, config=HEADS)(image())
    assert relative_error(tokens, CASE.outputs["out"]) < TOLERANCE


def test_a_transformers_state_gives_what_transformers_computes() -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=160, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=7
    )
    config.hidden_act = "gelu"
    theirs = CLIPVisionModelWithProjection(config).eval()
    pixels = torch.rand(2, 3, 28, 28) * 2 - 1
    encoder = load_image_encoder(theirs.state_dict())  # heads of 80: 160 in 2
    with torch.no_grad():
        expected = theirs(encoder._prepared(pixels), output_hidden_states=True).hidden_states[-2]
    assert relative_error(encoder(pixels), expected) < TOLERANCE


def test_sixteen_bits_on_a_cpu_compute_in_float32() -> None:
    state = {name: tensor.half() for name, tensor in CASE.state_dict().items()}
    encoder = load_image_encoder(state, config=HEADS)
    wide = load_image_encoder({name: tensor.float() for name, tensor in state.items()}, config=HEADS)
    assert encoder(image()).dtype == torch.float32
    assert encoder.layers[0].mlp.fc1.weight.dtype == torch.float16
    torch.testing.assert_close(encoder(image()), wide(image()))


@pytest.mark.parametrize("prefix", ["visual.", ""])
def test_the_published_file_fits(prefix: str) -> None:
    manifest = load_manifest("open-clip-xlm-roberta-large-vit-huge-14")
    state = {
        name.replace("visual.", prefix, 1) if name.startswith("visual.") else name: torch.empty(shape, device="meta")
        for name, shape in manifest.items()
    }
    assert check_image_encoder(state) == 1280
    state.pop(f"{prefix}transformer.3.attn.proj.bias")
    with pytest.raises(InputError, match=r"missing layers\.3\.self_attn\.out_proj\.bias"):
        check_image_encoder(state)


def test_another_file_is_refused() -> None:
    manifest = load_manifest("wan2.1-vae")
    with pytest.raises(InputError, match=r"is a Wan2.1 VAE, not a CLIP checkpoint"):
        check_image_encoder({name: torch.empty(shape, device="meta") for name, shape in manifest.items()})
