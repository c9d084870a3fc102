"""Lines of the generator: every sampling option by its name, and spellings of other tools."""

from dataclasses import replace

import pytest

from generate.jobs import default_request
from wan_train.errors import InputError
from wan_train.models.variants import VARIANTS
from wan_train.sampling.grammar import GENERATOR, parse_line, parse_table
from wan_train.sampling.settings import SamplingSettings

DEFAULTS = default_request(SamplingSettings(), VARIANTS["t2v-1.3B"])
LINE = (
    "a cat --infer_steps 8 --flow_shift 3 --guidance_scale 4 --video_length 9 --seed 5 --negative_prompt dark"
    " --sample_solver dpm++ --rand_device device --cfg_skip_mode late --cfg_apply_ratio 0.5 --cfg_merge"
    " --slg_layers 2,1 --slg_mode uncond --slg_scale 2 --slg_start 0.1 --slg_end 0.6"
)
WISHED = replace(
    DEFAULTS,
    prompt="a cat",
    steps=8,
    shift=3.0,
    guidance=4.0,
    frames=9,
    seed=5,
    negative_prompt="dark",
    solver="dpm++",
    rand_device="device",
    cfg_skip_mode="late",
    cfg_apply_ratio=0.5,
    cfg_merge=True,
    slg_layers=(1, 2),
    slg_mode="uncond",
    slg_scale=2.0,
    slg_start=0.1,
    slg_end=0.6,
)


def test_a_line_takes_every_sampling_option_by_its_name() -> None:
    assert parse_line(LINE, DEFAULTS, GENERATOR) == WISHED


def test_a_table_does_too() -> None:
    table = {
        "prompt": "a cat",
        **{"infer_steps": 8, "flow_shift": 3, "guidance_scale": 4, "video_length": 9, "seed": 5},
        **{"negative_prompt": "dark", "sample_solver": "dpm++", "rand_device": "device", "cfg_merge": True},
        **{"cfg_skip_mode": "late", "cfg_apply_ratio": 0.5, "slg_layers": [2, 1], "slg_mode": "uncond"},
        **{"slg_scale": 2.0, "slg_start": 0.1, "slg_end": 0.6},
    }
    assert parse_table(table, DEFAULTS, GENERATOR) == WISHED


def test_the_letter_g_is_guidance_in_the_generator_as_its_users_know_it() -> None:
    assert parse_line("a cat --g 3", DEFAULTS, GENERATOR).guidance == 3
    with pytest.raises(InputError, match="twice"):
        parse_line("a cat --g 3 --l 4", DEFAULTS, GENERATOR)


def test_a_line_can_list_noise_levels_and_another_a_number_of_steps() -> None:
    line = parse_line("a cat --timesteps 1000,750,500,250", DEFAULTS, GENERATOR)
    assert line.timesteps == (1000, 750, 500, 250) and line.steps == 4
    again = parse_line("a cat --s 7", line, GENERATOR)
    assert again.timesteps == () and again.steps == 7


def test_video_to_video_belongs_to_the_generator() -> None:
    line = parse_line("a cat --video_path a b.mp4 --denoising_strength 0.4", DEFAULTS, GENERATOR)
    assert (line.video_path, line.denoising_strength) == ("a b.mp4", 0.4)
    with pytest.raises(InputError, match="not supported in previews"):
        parse_line("a cat --video_path a.mp4", DEFAULTS)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a cat --sample_solver eular", "must be one of unipc"),
        ("a cat --timesteps 250,500", "must decrease"),
        ("a cat --timesteps 500,250 --video_path a.mp4", "--video_path"),
        ("a cat --slg_layers x", "--slg_layers x"),
        ("a cat --slg_layers -1", "from 0"),
        ("a cat --slg_layers 1 --slg_start 0.5 --slg_end 0.5", "--slg_start 0.5"),
        ("a cat --slg_layers 1 --l 1", "with --guidance_scale 1"),
        ("a cat --cfg_merge maybe", "true or false"),
        ("a cat --cfg_skip_mode early", "require each other"),
        ("a cat --denoising_strength 0", "0.001 to 1"),
        ("a cat --solver euler", "did you mean"),
    ],
)
def test_what_does_not_agree_is_refused(line: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        parse_line(line, DEFAULTS, GENERATOR)


def test_a_size_can_be_said_as_on_the_command_line() -> None:
    for said in (
        parse_line("a cat --video_size 64 48", DEFAULTS, GENERATOR),
        parse_table({"prompt": "a cat", "video_size": [64, 48]}, DEFAULTS, GENERATOR),
    ):
        assert (said.width, said.height) == (64, 48)
    for line, told in (
        ("a --video_size 64", "must be width and height"),
        ("a --video_size 64 48 --w 64", "set the same option"),
        ("a --video_size 64 8", "must be from 16 to 8192"),
    ):
        with pytest.raises(InputError, match=told):
            parse_line(line, DEFAULTS, GENERATOR)


def test_a_strength_needs_a_video() -> None:
    with pytest.raises(InputError, match="requires video_path"):
        parse_line("a cat --denoising_strength 0.5", DEFAULTS, GENERATOR)
    held = replace(DEFAULTS, video_path="a.mp4")
    assert parse_line("a cat --denoising_strength 0.5", held, GENERATOR).denoising_strength == 0.5
