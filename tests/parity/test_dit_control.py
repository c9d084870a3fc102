"""Control models: what stands for an absent input, what adds nothing, and VACE against diffusers'."""

from typing import Any

import pytest
import torch
from diffusers import WanVACETransformer3DModel
from torch import Tensor

from tests.parity.dit_cases import control_inputs, image_inputs, load
from tests.parity.golden import TOLERANCE, Case, load_case, normal, relative_error
from wan_train.models.dit.dit import Dit
from wan_train.models.loading import load_dit
from wan_train.models.stacks import all_blocks, block_names, hinted_layers
from wan_train.models.weights import diffusers_name


def run(model: Dit, case: Case, **changes: Any) -> Tensor:
    spec = case.spec
    channels = spec["config"]["in_dim"] - spec["y_channels"]
    latents = case.normal("x", (1, channels, *spec["latent"]))
    context = [case.normal("context.0", (spec["context_lens"][0], 48))]
    return model(latents, torch.tensor(spec["timesteps"]), context, **changes)


@pytest.mark.parametrize("name", ["fun_v11_control_ref", "wan22_fun_a14b_control"])
def test_zeros_stand_for_an_absent_reference(name: str) -> None:
    case = load_case(name)
    model, images = load(case), image_inputs(case)
    given = control_inputs(case)
    zeros = torch.zeros_like(given["reference_latents"])
    absent = run(model, case, **images)
    assert torch.equal(absent, run(model, case, **images, reference_latents=zeros))
    assert not torch.equal(absent, run(model, case, **images, **given))


@pytest.mark.parametrize("name", ["fun_control", "fun_v11_control_ref", "fun_v11_control_camera"])
def test_zeros_stand_for_absent_clip_tokens_of_control_models_alone(name: str) -> None:
    case = load_case(name)
    model, images, given = load(case), image_inputs(case), control_inputs(case)
    features = images.pop("clip_features")
    absent = run(model, case, **images, **given)
    assert torch.equal(absent, run(model, case, **images, **given, clip_features=torch.zeros_like(features)))
    case = load_case("wan21_i2v")
    with pytest.raises(ValueError, match="this model needs clip_features"):
        load(case)(
            torch.zeros(1, 16, 3, 8, 10),
            torch.tensor([1.0]),
            [torch.zeros(3, 48)],
            image_latents=torch.zeros(1, 20, 3, 8, 10),
        )


def test_a_scale_of_zero_and_no_context_are_the_base_to_the_bit() -> None:
    case = load_case("wan21_vace")
    base = load(case, {k: v for k, v in case.state_dict().items() if not k.startswith("vace_")})
    expected = run(base, case)
    model, given = load(case), control_inputs(case)
    assert torch.equal(run(model, case), expected)
    assert torch.equal(run(model, case, **given | {"vace_scale": 0.0}), expected)
    assert not torch.equal(run(model, case, **given), expected)


def test_a_motion_controller_without_a_bucket_is_the_base_to_the_bit() -> None:
    case = load_case("speedcontrol_v1")
    base = load_dit(case.state_dict(), config={"num_heads": 3})
    assert torch.equal(run(load(case), case), run(base, case))


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("wan21_t2v", {"reference_latents": torch.zeros(1, 16, 1, 8, 10)}, "no weights for reference_latents"),
        ("wan21_t2v", {"camera": torch.zeros(1, 24, 3, 64, 80)}, "no weights for camera"),
        ("wan21_t2v", {"vace_context": torch.zeros(1, 96, 3, 8, 10)}, "no weights for vace_context"),
        ("wan21_t2v", {"motion_bucket_id": torch.tensor([3])}, "no weights for motion_bucket_id"),
        ("fun_v11_control_camera", {"image_latents": torch.zeros(1, 16, 3, 8, 10)}, "this model requires a camera map"),
    ],
)
def test_inputs_without_weights_and_missing_ones_are_refused(name: str, given: dict[str, Tensor], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        run(load(load_case(name)), load_case(name), **given)


@pytest.mark.parametrize(("layers", "vace_layers"), [(4, (0, 2)), (5, (0, 3)), (3, (0, 1, 2))])
def test_vace_is_diffusers(layers: int, vace_layers: tuple[int, ...]) -> None:
    theirs = WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=16,
        out_channels=16,
        text_dim=20,
        ffn_dim=64,
        num_layers=layers,
        vace_layers=list(vace_layers),
        vace_in_channels=96,
    ).eval()
    state = {name: normal(name, p.shape) / 8 for name, p in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours = load_dit(state, config={"num_attention_heads": 2})
    assert ours.config.vace_layers == vace_layers == hinted_layers(layers, len(vace_layers))
    assert {diffusers_name(name) for name in ours.state_dict()} == set(state)
    latents, text, context = normal("x", (2, 16, 3, 4, 6)), normal("t", (2, 512, 20)), normal("c", (2, 96, 3, 4, 6))
    timestep = torch.tensor([37.0, 901.0])
    with torch.no_grad():
        scale = torch.full((len(vace_layers),), 0.6)
        expected = theirs(
            latents,
            timestep,
            text,
            control_hidden_states=context,
            control_hidden_states_scale=scale,
            return_dict=False,
        )[0]
    assert relative_error(ours(latents, timestep, text, vace_context=context, vace_scale=0.6), expected) < TOLERANCE


def test_blocks_come_in_the_order_of_a_pass() -> None:
    model = load(load_case("wan21_vace"))
    seen: list[torch.nn.Module] = []
    for block in all_blocks(model):
        block.register_forward_pre_hook(lambda module, inputs: seen.append(module))
    case = load_case("wan21_vace")
    run(model, case, **control_inputs(case))
    assert seen == all_blocks(model)
    named = {block: name for name, block in model.named_modules()}
    assert (
        block_names(model.state_dict()) == [named[block] for block in seen] == ["vace_blocks.0", "blocks.0", "blocks.1"]
    )
