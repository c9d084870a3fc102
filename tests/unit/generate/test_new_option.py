"""A sampling option is one declaration: whatever else says or keeps it is made from that."""

from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from generate.jobs import make_jobs, parse_job
from generate.record import make_record
from generate.settings import GenerateSettings
from wan_train.cli import option, parse
from wan_train.errors import InputError
from wan_train.media_out import write_image
from wan_train.sampling.grammar import Grammar, parse_line, parse_table
from wan_train.sampling.options import Sampled
from wan_train.sampling.request import SampleRequest
from wan_train.sampling.settings import SamplingSettings

BASE = ("--task", "t2v-1.3B", "--dit", "dit.safetensors", "--prompt", "a cat")


@pytest.fixture
def settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The generator's settings as if `SampleOptions` had the options of the test's class too."""
    sampling, requests = (
        dataclass(frozen=True)(type(base.__name__, (request.param, base), {"__doc__": base.__doc__}))
        for base in (SamplingSettings, SampleRequest)
    )
    monkeypatch.setattr("generate.jobs.SampleRequest", requests)
    return make_dataclass("Settings", [("sampling", sampling)], bases=(GenerateSettings,), frozen=True)


@dataclass(frozen=True, kw_only=True)
class Warmth:
    warmth: float = option(0.5, "How warm it is.", minimum=0, maximum=1, traits=Sampled(letter="wm"))


@pytest.mark.parametrize("settings", [Warmth], indirect=True)
def test_one_declaration_reaches_command_line_prompts_request_and_record(settings: Any, tmp_path: Path) -> None:
    held = parse(settings, [*BASE, "--warmth", "0"])
    (job,) = make_jobs(held)
    assert job.request.warmth == 0.0 and make_jobs(parse(settings, BASE))[0].request.warmth == 0.5
    lines = ("a dog", "a dog --wm 1", "a dog --warmth=0.75")
    assert [parse_job(line, held, 0).request.warmth for line in lines] == [0.0, 1.0, 0.75]
    grammar = Grammar(is_preview=False, settings=type(held.sampling))
    assert parse_table({"prompt": "a dog", "warmth": 0.25}, job.request, grammar).warmth == 0.25
    record = make_record(held, job.request, {})
    assert record.options["warmth"] == 0.0
    write_image(tmp_path / "x.png", np.zeros((32, 32, 3), dtype=np.uint8), comment=record.text())
    (again,) = make_jobs(parse(settings, ["--from_metadata", str(tmp_path / "x.png")]))
    assert again.request.warmth == 0.0


@pytest.mark.parametrize("settings", [Warmth], indirect=True)
def test_its_range_and_its_names_hold_everywhere(settings: Any) -> None:
    with pytest.raises(InputError, match="--warmth: 2 is out of range: expected 0 to 1"):
        parse(settings, [*BASE, "--warmth", "2"])
    held = parse(settings, BASE)
    for line, told in (
        ("a dog --wm 2", "--wm 2 in a prompt: must be from 0 to 1"),
        ("a dog --wm x", "--wm x in a prompt: must be a number"),
        ("a dog --wrm 1", "did you mean --wm"),
        ("a dog --wm 1 --warmth 1", "--wm is given twice"),
    ):
        with pytest.raises(InputError, match=told):
            parse_job(line, held, 0)
    with pytest.raises(InputError, match='"-wm 1" looks like an option'):
        parse_job("a dog -wm 1", parse(settings, [*BASE, "--strict_prompts"]), 0)


@dataclass(frozen=True, kw_only=True)
class Files:
    toys: tuple[str, ...] = option((), "Files of toys.", traits=Sampled(is_file=True, not_in_previews="no toys"))
    spins: tuple[int, ...] = option((), "How often each is spun.", minimum=0, traits=Sampled(beside="toys"))


@pytest.mark.parametrize("settings", [Files], indirect=True)
def test_files_are_hashed_and_several_values_read(settings: Any, tmp_path: Path) -> None:
    toys = (str(tmp_path / "a toy"), str(tmp_path / "b"))
    for path in toys:
        Path(path).write_text("a toy")
    held = parse(settings, [*BASE, "--toys", *toys, "--spins", "1", "2"])
    (job,) = make_jobs(held)
    line = parse_job(f"a cat --toys {toys[0]} --toys {toys[1]} --spins 1,2", parse(settings, BASE), 0)
    for made in (job.request, line.request):
        assert (made.toys, made.spins) == (toys, (1, 2))
    record = make_record(held, job.request, {})
    assert (record.options["toys"], record.options["spins"]) == (list(toys), [1, 2]) and set(record.hashes) == {"toys"}
    (without,) = make_jobs(parse(settings, [*BASE, "--spins", "1"]))
    assert "spins" not in make_record(held, without.request, {}).options
    with pytest.raises(InputError, match="--spins -1 in a prompt: must be 0 or more"):
        parse_job("a dog --spins -1", held, 0)
    with pytest.raises(InputError, match="--toys: no toys"):
        parse_line("a dog --toys a", job.request, Grammar(is_preview=True, settings=type(held.sampling)))
