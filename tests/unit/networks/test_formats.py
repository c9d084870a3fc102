"""Reading LoRA files of every naming, and refusing what would do something else than it says."""

import json

import pytest
import torch

from networks.formats.files import check_lora, kohya_state, peft_state, read_lora
from networks.formats.keys import match_keys
from wan_train.errors import InputError
from wan_train.models.weights import diffusers_name
from wan_train.storage import save_tensors


def linear_names(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def linear_sizes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(model.get_submodule(name).weight.shape) for name in linear_names(model)}


def as_named(deltas, pattern: str, halves: tuple[str, str], *, rename=lambda name: name, alpha: bool) -> dict:
    state = {}
    for module, delta in deltas.items():
        name = pattern.format(M=rename(module), U=rename(module).replace(".", "_"))
        state[f"{name}.{halves[0]}"], state[f"{name}.{halves[1]}"] = delta.down, delta.up
        if alpha:
            state[f"{name}.alpha"] = torch.tensor(2.0)
    return state


NAMINGS = {
    "kohya": ("lora_unet_{U}", ("lora_down.weight", "lora_up.weight"), {}),
    "videox-fun": ("lora_unet__{U}", ("lora_down.weight", "lora_up.weight"), {}),
    "comfyui": ("diffusion_model.{M}", ("lora_down.weight", "lora_up.weight"), {}),
    "peft": ("diffusion_model.{M}", ("lora_A.weight", "lora_B.weight"), {}),
    "diffusers": ("transformer.{M}", ("lora_A.weight", "lora_B.weight"), {"rename": diffusers_name}),
    "diffsynth": ("{M}", ("lora_A.default.weight", "lora_B.default.weight"), {}),
    "bare": ("{M}", ("lora_A.weight", "lora_B.weight"), {}),
    "peft adapter": ("base_model.model.{M}", ("lora_A.weight", "lora_B.weight"), {}),
    "peft adapter of diffusers": (
        "base_model.model.{M}",
        ("lora_A.weight", "lora_B.weight"),
        {"rename": diffusers_name},
    ),
    "kohya of diffusers": ("lora_unet_{U}", ("lora_down.weight", "lora_up.weight"), {"rename": diffusers_name}),
    "whole checkpoint": ("model.diffusion_model.{M}", ("lora_up.weight", "lora_down.weight")[::-1], {}),
    "no suffix": ("{M}", ("lora_A", "lora_B"), {}),
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("alpha", [True, False])
def test_every_naming_gives_the_same_pairs(make_model, make_deltas, naming: str, alpha: bool) -> None:
    model = make_model(image=True)
    deltas = make_deltas(model, rank=4, alpha=2.0)
    pattern, halves, options = NAMINGS[naming]
    read = read_lora(as_named(deltas, pattern, halves, alpha=alpha, **options), linear_names(model))
    assert list(read) == list(deltas)
    for module, delta in read.items():
        assert delta.scale == (0.5 if alpha else 1.0)
        assert torch.equal(delta.down, deltas[module].down) and torch.equal(delta.up, deltas[module].up)


def test_modules_outside_the_blocks_are_found_too(make_model) -> None:
    state = {
        "transformer.condition_embedder.text_embedder.linear_1.lora_A.weight": torch.ones(1, 8),
        "transformer.condition_embedder.text_embedder.linear_1.lora_B.weight": torch.ones(8, 1),
        "lora_unet_head_head.lora_down.weight": torch.ones(1, 8),
        "lora_unet_head_head.lora_up.weight": torch.ones(8, 1),
    }
    assert set(read_lora(state, linear_names(make_model()))) == {"text_embedding.0", "head.head"}


@pytest.mark.parametrize("where", ["metadata", "beside", "folder"])
@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_alpha_of_a_peft_configuration(make_model, make_deltas, tmp_path, where, rslora, scale) -> None:
    model = make_model()
    path = tmp_path / "adapter_model.safetensors"
    config = {"lora_alpha": 8, "r": 4, "alpha_pattern": {}, "use_rslora": rslora}
    metadata = {}
    if where == "metadata":
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    state = as_named(make_deltas(model, rank=4), *NAMINGS["peft adapter"][:2], alpha=False)
    save_tensors(path, state, metadata)
    read = read_lora(tmp_path if where == "folder" else path, linear_names(model))
    assert {delta.scale for delta in read.values()} == {scale}


def test_a_configuration_beside_another_file_is_not_asked(make_model, make_deltas, tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    state = as_named(make_deltas(make_model()), *NAMINGS["peft"][:2], alpha=False)
    save_tensors(tmp_path / "mine.safetensors", state)
    assert next(iter(read_lora(tmp_path / "mine.safetensors", linear_names(make_model())).values())).scale == 1.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a PEFT configuration"),
        ('{"lora_alpha": "8"}', "must be a number"),
        ('{"lora_alpha": 8, "alpha_pattern": {"ffn.0": 4}}', "alpha_pattern"),
    ],
)
def test_configurations_that_cannot_be_followed(make_model, make_deltas, tmp_path, config, message) -> None:
    path = tmp_path / "lora.safetensors"
    state = as_named(make_deltas(make_model()), *NAMINGS["peft"][:2], alpha=False)
    save_tensors(path, state, {"lora_adapter_metadata": config})
    for read in (
        lambda: read_lora(path, linear_names(make_model())),
        lambda: check_lora(path, linear_sizes(make_model())),
    ):
        with pytest.raises(InputError, match=message):
            read()


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_blocks_0_ffn_0.hada_w1_a", "LoHa"),
        ("lora_unet_blocks_0_ffn_0.lokr_w1", "LoKr"),
        ("diffusion_model.blocks.0.ffn.0.dora_scale", "DoRA"),
        ("base_model.model.blocks.0.ffn.0.lora_magnitude_vector.weight", "DoRA"),
        ("diffusion_model.blocks.0.norm3.diff_b", "diff"),
        ("diffusion_model.blocks.0.diff_m", "diff"),
        ("diffusion_model.blocks.0.ffn.0.lora_B.bias", "biases"),
    ],
)
def test_other_formats_are_named(make_model, make_deltas, key: str, kind: str) -> None:
    state = kohya_state(make_deltas(make_model())) | {key: torch.ones(2, 2)}
    with pytest.raises(InputError, match=f"unsupported format.*{kind}"):
        read_lora(state, linear_names(make_model()))


def test_a_checkpoint_of_another_kind_is_named(make_model, tmp_path) -> None:
    save_tensors(tmp_path / "dit.safetensors", make_model().state_dict() | {"head.modulation": torch.ones(1)})
    with pytest.raises(InputError, match=r"dit\.safetensors is a Wan DiT, not a LoRA"):
        check_lora(tmp_path / "dit.safetensors", linear_sizes(make_model()))
    with pytest.raises(InputError, match="not a LoRA"):
        read_lora({"something": torch.ones(1)}, linear_names(make_model()))


def test_keys_that_match_nothing_are_listed_with_the_number_that_match(make_model, make_deltas) -> None:
    model, larger = make_model(), make_model(image=True)
    state = peft_state(make_deltas(larger), "diffusion_model")
    with pytest.raises(
        InputError, match=r"20 modules match.* 8 keys do not: .*blocks\.0\.cross_attn\.k_img\.lora_A"
    ) as caught:
        read_lora(state, linear_names(model))
    assert str(caught.value).count("_img") == 8
    many = {f"diffusion_model.blocks.{i}.ffn.0.lora_A.weight": torch.ones(1, 8) for i in range(2, 40)}
    with pytest.raises(InputError, match=r"0 modules match.*38 keys.* and 28 more"):
        read_lora(many, linear_names(model))


def test_underscores_are_not_taken_for_dots_or_parts_for_names(make_model) -> None:
    names = linear_names(make_model(image=True))
    for name in ("lora_unet_blocks_0_cross_attn_k_im", "lora_unet_blocks_01_cross_attn_k", "lora_te_blocks_0_ffn_0"):
        match = match_keys({f"{name}.lora_down.weight": (1, 8)}, names, "it")
        assert not match.groups and len(match.unmatched) == 1


@pytest.mark.parametrize("half", ["lora_down.weight", "lora_up.weight"])
def test_half_a_pair_is_refused(make_model, make_deltas, half: str) -> None:
    state = kohya_state(make_deltas(make_model()))
    del state[f"lora_unet_blocks_0_ffn_0.{half}"]
    with pytest.raises(InputError, match=r"blocks\.0\.ffn\.0.*incomplete"):
        read_lora(state, linear_names(make_model()))


def test_two_tensors_for_one_part_are_refused(make_model, make_deltas) -> None:
    deltas = make_deltas(make_model())
    with pytest.raises(InputError, match="two tensors"):
        read_lora(kohya_state(deltas) | peft_state(deltas, "diffusion_model"), linear_names(make_model()))


def test_pairs_that_do_not_multiply_are_refused(make_model, make_deltas) -> None:
    state = kohya_state(make_deltas(make_model(), rank=3))
    state["lora_unet_blocks_0_ffn_0.lora_up.weight"] = torch.ones(12, 2)
    with pytest.raises(InputError, match="cannot be multiplied"):
        read_lora(state, linear_names(make_model()))
    state["lora_unet_blocks_0_ffn_0.lora_up.weight"] = torch.ones(12, 3, 1, 1)
    with pytest.raises(InputError, match="convolution"):
        check_lora(state, linear_sizes(make_model()))


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.tensor(float("nan"))])
def test_alpha_that_is_no_number_is_refused(make_model, make_deltas, alpha) -> None:
    state = kohya_state(make_deltas(make_model())) | {"lora_unet_blocks_0_ffn_0.alpha": alpha}
    with pytest.raises(InputError, match="not one finite number"):
        read_lora(state, linear_names(make_model()))


def test_a_lora_of_another_size_is_refused_with_both_sizes(make_model, make_deltas, tmp_path) -> None:
    path = tmp_path / "large.safetensors"
    save_tensors(path, kohya_state(make_deltas(make_model(dim=16, image=True))))
    with pytest.raises(
        InputError, match=r"large\.safetensors was trained for a different model.*16 x 16, but this model's is 8 x 8"
    ):
        check_lora(path, linear_sizes(make_model()))


def test_check_accepts_what_read_accepts(make_model, make_deltas, tmp_path) -> None:
    model = make_model()
    for name, state in (("a", kohya_state(make_deltas(model))), ("b", peft_state(make_deltas(model), "transformer"))):
        save_tensors(tmp_path / f"{name}.safetensors", state)
        check_lora(tmp_path / f"{name}.safetensors", linear_sizes(model))
    with pytest.raises(InputError, match="no such file"):
        check_lora(tmp_path / "c.safetensors", linear_sizes(model))
