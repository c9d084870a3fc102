"""Command lines of other tools, as their users have them, beside ours."""

from pathlib import Path

import pytest

import wan_train
from generate.output import check_target
from generate.settings import TOOL, GenerateSettings
from tests.unit.generate.conftest import Given
from wan_train.cli import parse, run
from wan_train.errors import InputError

PROMPT = "a red circle moves to the right"


def made(folder: Path, *words: object) -> bytes:
    """What a command line of the generator writes into its only file."""
    assert run(TOOL, [str(word) for word in words]) == 0
    (file,) = folder.iterdir()
    return file.read_bytes()


def test_a_command_line_of_mindie_makes_the_video_of_ours(models: Path, tmp_path: Path) -> None:
    theirs = made(
        tmp_path / "theirs",
        *("--task", "t2v-1.3B", "--model_base", models, "--size", "64*48", "--frame_num", 5, "--sample_steps", 2),
        *("--ulysses_size", 1, "--cfg_size", 1, "--base_seed", 7, "--sample_guide_scale", 3, "--sample_shift", 4),
        *("--prompt", PROMPT, "--save_file", tmp_path / "theirs" / "a.mp4", "--device", "cpu", "--no_metadata"),
    )
    ours = made(
        tmp_path / "ours",
        *(
            "--task",
            "t2v-1.3B",
            "--dit",
            models / "wan_t2v_tiny.safetensors",
            "--vae",
            models / "Wan2.1_VAE.safetensors",
        ),
        *("--t5", models / "models_t5_umt5-xxl-enc-bf16.safetensors", "--video_size", 64, 48, "--video_length", 5),
        *("--infer_steps", 2, "--seed", 7, "--guidance_scale", 3, "--flow_shift", 4, "--prompt", PROMPT),
        *("--save_path", tmp_path / "ours" / "a.mp4", "--device", "cpu", "--no_metadata"),
    )
    assert theirs == ours


def test_a_command_line_of_maxdiffusion_names_its_files(models: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPT} --d 3\n{PROMPT} --d 5\n")
    command = [
        *("--task", "t2v-1.3B", "--ckpt_dir", models, "--size", "64*48", "--video_length", 5, "--infer_steps", 1),
        *("--from_file", tmp_path / "prompts.txt", "--save_path", tmp_path / "out", "--device", "cpu"),
        *("--output_pattern", "wan_output_{seed}_{index}.mp4"),
    ]
    assert run(TOOL, [str(word) for word in command]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"wan_output_3_000.mp4", "wan_output_5_001.mp4"}


def test_a_folder_of_checkpoints_and_a_size_in_one_word_from_python(models: Path) -> None:
    given = {"task": "t2v-1.3B", "ckpt_dir": str(models), "infer_steps": 1, "video_length": 1, "device": "cpu"}
    assert wan_train.generate(PROMPT, video_size="48*32", **given).shape == (1, 32, 48, 3)


def test_a_pattern_without_a_folder_is_for_the_current_one(given: Given) -> None:
    assert given("--output_pattern", "w_{seed}.mp4").output.target == "w_{seed}.mp4"


def test_the_names_of_images_mean_the_same(models: Path) -> None:
    def settings(*words: str) -> GenerateSettings:
        return parse(GenerateSettings, ["--task", "i2v-14B", "--prompt", PROMPT, *words])

    theirs = settings("--size=832*480", "--image", "a.png", "--frame_num", "81")
    assert theirs == settings("--video_size", "832", "480", "--image_path", "a.png", "--video_length", "81")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--output_pattern", "{seed}"), "--output_pattern {seed} is not a file name"),
        (("--output_pattern", "a/{seed}.mp4"), "is not a file name"),
        (("--output_pattern", "{name}.mp4"), "unknown placeholder {name}"),
        (("--output_pattern", "a.mp4", "--save_path", "b.mp4"), "and --save_path b.mp4 both name a file"),
        (("--output_pattern", "a.webm"), ".webm is not supported"),
        (("--size", "64*x"), "--size"),
        (("--size", "8*8"), "16 or more"),
    ],
)
def test_what_cannot_be_is_refused(
    words: tuple[str, ...], told: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--task", "t2v-1.3B", "--ckpt_dir", str(models), "--prompt", PROMPT, "--device", "cpu"]
    assert run(TOOL, [*common, *words]) == 2
    assert told in capsys.readouterr().err


def test_several_videos_need_an_index_in_the_pattern(models: Path, tmp_path: Path, given: Given) -> None:
    with pytest.raises(InputError, match=r"--output_pattern .*a.mp4 names one file for several videos"):
        check_target(given("--output_pattern", "a.mp4", "--save_path", tmp_path).output, 2)
