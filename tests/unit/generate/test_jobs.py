"""What the command line and files ask for."""

from dataclasses import replace
from pathlib import Path

import pytest

from generate.jobs import make_jobs, parse_job, request_options
from generate.settings import GenerateSettings
from tests.unit.generate.conftest import Given
from wan_train.config_file import from_values
from wan_train.errors import InputError

EVERYTHING = (
    *("--prompt", "a cat", "--negative_prompt", "dark", "--seed", 5, "--guidance_scale", 4, "--flow_shift", 3),
    *("--sample_solver", "dpm++", "--cfg_skip_mode", "late", "--cfg_apply_ratio", 0.5, "--cfg_merge"),
    *("--slg_layers", "1", "--slg_mode", "uncond", "--slg_scale", 2, "--slg_start", 0.1, "--slg_end", 0.6),
    *("--video_path", "a.mp4", "--denoising_strength", 0.4, "--rand_device", "device"),
)


def test_the_options_of_a_request_state_it_again(given: Given) -> None:
    for words in (EVERYTHING, ("--prompt", "b", "--timesteps", "1000,500"), ("--prompt=-x", "--cpu_noise")):
        (job,) = make_jobs(given(*words))
        options = request_options(job.request) | {"task": job.request.variant.name}
        (again,) = make_jobs(from_values(GenerateSettings, options, "here"))
        assert again.request == replace(job.request, shift=job.request.noise_shift)


def test_a_seed_is_drawn_where_there_is_none(given: Given) -> None:
    seeds = {make_jobs(given("--prompt", "a"))[0].request.seed for _ in range(3)}
    assert len(seeds) == 3 and None not in seeds
    assert make_jobs(given("--prompt", "a", "--seed", 0))[0].request.seed == 0


def test_lines_of_a_file_stand_over_the_command_line(given: Given, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na dog --d 9 --s 7 --l 2\na cow --n dark\n")
    jobs = make_jobs(given("--from_file", path, "--seed", 4, "--guidance_scale", 6))
    assert [(job.index, job.request.prompt) for job in jobs] == [(0, "a cat"), (1, "a dog"), (2, "a cow")]
    assert [job.request.seed for job in jobs] == [4, 9, 4]
    assert [job.request.steps for job in jobs] == [2, 7, 2]
    assert [job.request.guidance for job in jobs] == [6, 2, 6]
    assert [job.request.negative_prompt == "dark" for job in jobs] == [False, False, True]
    line = parse_job("a bird --f 9", given("--seed", 4), 3)
    assert (line.index, line.request.seed, line.request.frames) == (3, 4, 9)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "--prompt is missing"),
        (("--prompt", " "), "--prompt is missing"),
        (("--prompt", "a", "--denoising_strength", 0.5), "--video_path"),
        (("--prompt", "a", "--slg_mode", "uncond"), "requires --slg_layers"),
        (("--prompt", "a", "--slg_layers", "one"), "write 9 or 9,10"),
        (("--prompt", "a", "--timesteps", "x"), "write 1000,750,500,250"),
        (("--prompt", "a", "--timesteps", "900,500,100"), "lists 3 steps, --infer_steps is 2"),
        (("--prompt", "a", "--cfg_apply_ratio", 0.5), "require each other"),
    ],
)
def test_what_does_not_agree_is_refused(words: tuple[object, ...], told: str, given: Given) -> None:
    with pytest.raises(InputError, match=told):
        make_jobs(given(*words))
