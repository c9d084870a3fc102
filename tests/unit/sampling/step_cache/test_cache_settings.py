"""Options of step caches: which go together, and what they mean by default."""

from dataclasses import replace
from typing import Any

import pytest

from tests.unit.sampling.step_cache.tiny import request
from wan_train.cli import parse
from wan_train.errors import InputError
from wan_train.models.variants import VARIANTS
from wan_train.sampling.grammar import parse_line
from wan_train.sampling.request import checked, preview_defaults
from wan_train.sampling.step_cache.settings import attention_range, teacache_model


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tea_cache_l1_thresh": 0.1}, "--tea_cache_l1_thresh applies to --step_cache teacache.*is none"),
        ({"step_cache": "teacache", "magcache_k": 3}, "--magcache_k applies to --step_cache magcache.*teacache"),
        ({"step_cache": "teacache", "end_step": 3}, "--end_step applies to --step_cache attention"),
        ({"step_cache": "attention", "error_budget": 0.1}, "--error_budget applies to --step_cache auto"),
        ({"step_cache": "attention", "cache_profile": "a"}, "--cache_profile applies to .* magcache and auto"),
        ({"step_cache": "auto"}, "--step_cache auto requires --cache_profile.*--calibrate_steps N"),
        ({"step_cache": "magcache"}, "--step_cache magcache requires --cache_profile"),
        ({"step_cache": "attention", "start_step": 9, "end_step": 9}, "--start_step 9 and --end_step 9"),
        ({"step_cache": "attention", "end_step": 13}, "not a range of 12 steps"),
    ],
)
def test_options_that_do_not_agree_are_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        checked(request(**options))


@pytest.mark.parametrize(
    ("task", "size", "model"),
    [
        ("t2v-1.3B", (832, 480), "Wan2.1-T2V-1.3B"),
        ("fun-control-1.3B", (832, 480), "Wan2.1-T2V-1.3B"),
        ("vace-1.3B", (832, 480), "Wan2.1-T2V-1.3B"),
        ("t2v-14B", (832, 480), "Wan2.1-T2V-14B"),
        ("i2v-14B", (832, 480), "Wan2.1-I2V-14B-480P"),
        ("i2v-14B", (1280, 720), "Wan2.1-I2V-14B-720P"),
        ("fun-control-14B", (832, 480), "Wan2.1-I2V-14B-720P"),
        ("vace-14B", (832, 480), "Wan2.1-I2V-14B-720P"),
        ("t2v-A14B", (832, 480), "Wan2.1-I2V-14B-720P"),
        ("ti2v-5B", (1280, 704), "Wan2.1-I2V-14B-720P"),
    ],
)
def test_coefficients_by_task_and_size(task: str, size: tuple[int, int], model: str) -> None:
    assert teacache_model(VARIANTS[task], *size) == model


def test_the_range_of_the_attention_cache_is_the_middle_half() -> None:
    assert attention_range(request(), 50) == (12, 37)
    assert attention_range(request(start_step=1, end_step=5), 50) == (1, 5)


def test_prompt_lines_choose_a_cache() -> None:
    line = "a cat --step_cache teacache --tea_cache_l1_thresh 0.2"
    wanted = parse_line(line, preview_defaults(VARIANTS["t2v-1.3B"]))
    assert (wanted.step_cache, wanted.tea_cache_l1_thresh) == ("teacache", 0.2)


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("--step_cache none", {}),
        ("--step_cache attention --end_step 9", {"end_step": 9}),
        ("--step_cache magcache", {"cache_profile": "a.json"}),
        ("--step_cache auto", {"cache_profile": "a.json", "error_budget": 0.2}),
    ],
)
def test_a_cache_chosen_in_a_line_takes_the_place_of_the_one_for_all_lines(line: str, kept: dict[str, Any]) -> None:
    for_all = replace(
        preview_defaults(VARIANTS["t2v-1.3B"]), step_cache="auto", cache_profile="a.json", error_budget=0.2
    )
    wanted = parse_line(f"a cat {line}", for_all)
    plain = parse_line("a cat", preview_defaults(VARIANTS["t2v-1.3B"]))
    assert wanted == replace(plain, step_cache=line.split()[1], **kept)


def test_an_option_of_another_cache_in_the_same_line_is_refused() -> None:
    with pytest.raises(InputError, match="--error_budget applies to --step_cache auto only"):
        parse_line("a cat --step_cache none --error_budget 0.1", preview_defaults(VARIANTS["t2v-1.3B"]))


def test_mindies_switch_is_the_attention_cache() -> None:
    from generate.settings import GenerateSettings

    assert parse(GenerateSettings, ["--use_attentioncache"]).sampling.step_cache == "attention"
