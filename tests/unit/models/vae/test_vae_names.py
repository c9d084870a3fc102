import pytest

from tests.parity.golden import load_manifest
from wan_train.models.vae.names import diffusers_name, official_name, vae_rename

NAMES = list(load_manifest("wan2.1-vae"))
NAMES22 = list(load_manifest("wan2.2-vae"))


def test_names_go_both_ways() -> None:
    foreign = [diffusers_name(name) for name in NAMES]
    assert len(set(foreign)) == len(NAMES)
    assert [official_name(name) for name in foreign] == NAMES


@pytest.mark.parametrize(
    ("official", "diffusers"),
    [
        ("conv1.weight", "quant_conv.weight"),
        ("conv2.bias", "post_quant_conv.bias"),
        ("encoder.conv1.weight", "encoder.conv_in.weight"),
        ("decoder.head.0.gamma", "decoder.norm_out.gamma"),
        ("decoder.middle.1.to_qkv.weight", "decoder.mid_block.attentions.0.to_qkv.weight"),
        ("encoder.downsamples.5.time_conv.bias", "encoder.down_blocks.5.time_conv.bias"),
        ("decoder.upsamples.4.shortcut.weight", "decoder.up_blocks.1.resnets.0.conv_shortcut.weight"),
        ("decoder.upsamples.11.resample.1.bias", "decoder.up_blocks.2.upsamplers.0.resample.1.bias"),
    ],
)
def test_a_sample_of_names(official: str, diffusers: str) -> None:
    assert official_name(diffusers) == official
    assert diffusers_name(official) == diffusers


def test_each_naming_is_recognised() -> None:
    shapes = dict.fromkeys(NAMES, (1,))
    assert [vae_rename(shapes)(name) for name in NAMES] == NAMES
    foreign = {diffusers_name(name): (1,) for name in NAMES}
    assert [vae_rename(foreign)(name) for name in foreign] == NAMES


def test_the_stages_of_wan22_go_both_ways() -> None:
    foreign = [diffusers_name(name) for name in NAMES22]
    assert len(set(foreign)) == len(NAMES22) and not set(foreign) & set(NAMES22)
    assert [official_name(name, staged=True) for name in foreign] == NAMES22
    for names in (NAMES22, foreign):
        assert [vae_rename(dict.fromkeys(names, (1,)))(name) for name in names] == NAMES22


@pytest.mark.parametrize(
    ("official", "diffusers"),
    [
        ("encoder.downsamples.1.downsamples.0.shortcut.bias", "encoder.down_blocks.1.resnets.0.conv_shortcut.bias"),
        ("encoder.downsamples.0.downsamples.2.resample.1.bias", "encoder.down_blocks.0.downsampler.resample.1.bias"),
        ("encoder.downsamples.2.downsamples.2.time_conv.bias", "encoder.down_blocks.2.downsampler.time_conv.bias"),
        ("decoder.upsamples.3.upsamples.2.residual.6.bias", "decoder.up_blocks.3.resnets.2.conv2.bias"),
        ("decoder.upsamples.1.upsamples.3.time_conv.bias", "decoder.up_blocks.1.upsampler.time_conv.bias"),
    ],
)
def test_a_sample_of_the_names_of_wan22(official: str, diffusers: str) -> None:
    assert official_name(diffusers, staged=True) == official
    assert diffusers_name(official) == diffusers


def test_the_number_of_blocks_per_stage_is_counted() -> None:
    foreign = [
        diffusers_name(name, stage_blocks=2)
        for name in ("decoder.upsamples.2.resample.1.bias", "decoder.upsamples.3.shortcut.bias")
    ]
    shapes = dict.fromkeys([*foreign, "decoder.up_blocks.0.resnets.0.x", "decoder.up_blocks.0.resnets.1.x"], (1,))
    assert [vae_rename(shapes)(name) for name in foreign] == [
        "decoder.upsamples.2.resample.1.bias",
        "decoder.upsamples.3.shortcut.bias",
    ]


def test_other_names_stay() -> None:
    for name in ("decoder.up_blocks.x.resnets.0.conv1.weight", "loss", "encoder.unknown.weight"):
        assert official_name(name) == name
