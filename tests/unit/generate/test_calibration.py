"""Calibrating from the command line, and what a run with a step cache says of itself."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from generate.calibration import SAFETY
from generate.jobs import make_jobs
from generate.main import main
from generate.preflight import fitted_jobs
from generate.record import KEY
from tests.unit.generate.conftest import Given
from wan_train.errors import InputError
from wan_train.media_out import write_video
from wan_train.sampling.step_cache.profile import Entry, Profile, read_profile, run_settings, write_profile
from wan_train.storage import read_header

STEPS = 8


def latents(given: Given, folder: Path, *words: object) -> tuple[torch.Tensor, dict[str, object]]:
    """The latents of a command, and their record."""
    command = ["--prompt", "a cat", "--seed", 1, "--guidance_scale", 2, "--sample_solver", "euler"]
    path = folder / "one_latent.safetensors"
    main(given(*command, "--output_type", "latent", "--save_path", path.with_name("one.safetensors"), *words))
    (made,) = folder.glob("*.safetensors")
    found = load_file(made)["latent"], json.loads(read_header(str(made)).metadata[KEY])
    made.unlink()
    return found


def test_a_profile_from_the_command_line_keeps_its_budget(
    given: Given, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profile, out = tmp_path / "profile.json", tmp_path / "out"
    out.mkdir()
    auto = ["--step_cache", "auto", "--cache_profile", profile, "--error_budget", 0.3]
    calibrating = ["--prompt", "a dog", "--seed", 7, "--guidance_scale", 2, "--sample_solver", "euler"]
    main(given(*calibrating, *auto, "--infer_steps", STEPS, "--calibrate_steps", STEPS))
    (entry,) = read_profile(profile).entries
    assert entry.settings["infer_steps"] == str(STEPS) and entry.models["dit"] and entry.scale >= SAFETY
    assert "largest measured" in caplog.text and not list(out.iterdir())

    full, plain = latents(given, out, "--infer_steps", STEPS)
    cached, record = latents(given, out, "--infer_steps", STEPS, *auto)
    assert float((cached - full).norm() / full.norm()) <= 0.3
    assert "passes" not in plain
    passes = record["passes"]
    assert isinstance(passes, dict) and passes["reused"] > 0 and sum(passes.values()) == 2 * STEPS
    assert f"step cache auto: {passes['computed']} passes computed, {passes['reused']} reused" in caplog.text
    options = record["options"]
    assert isinstance(options, dict)
    assert (options["step_cache"], options["error_budget"]) == ("auto", 0.3)

    write_profile(profile, Profile())
    with pytest.raises(InputError, match="has no entries"):
        latents(given, out, "--infer_steps", STEPS, *auto)


def test_a_profile_is_checked_for_the_length_that_the_source_leaves(given: Given, tmp_path: Path) -> None:
    """A run of 33 frames from a video of 5 is one of 5."""
    source, profile = tmp_path / "source.mp4", tmp_path / "profile.json"
    write_video(source, np.zeros((5, 32, 32, 3), dtype=np.uint8), fps=16)
    words = ("--prompt", "a cat", "--seed", 1, "--step_cache", "auto", "--cache_profile", profile)
    settings = given(*words, "--video_path", source, "--video_length", 33)
    (job,) = make_jobs(settings)
    short = replace(job.request, frames=5)
    for measured in (job.request, short):
        write_profile(profile, Profile((Entry(run_settings(measured), {}, [2, 2], [], {}),)))
        if measured is short:
            assert [fitted.request for fitted in fitted_jobs([job], settings)] == [short]
        else:
            with pytest.raises(InputError, match="about 32 tokens in the profile, about 8 tokens in this run"):
                fitted_jobs([job], settings)


def test_a_scale_is_raised_until_the_videos_keep_the_budget(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predictions that are too low by far are found out on the calibration's own video."""
    profile = tmp_path / "profile.json"
    monkeypatch.setattr("generate.calibration.joined", lambda entries: _lowered(entries[0]))
    words = [
        "--prompt",
        "a cat",
        "--seed",
        1,
        "--guidance_scale",
        2,
        "--step_cache",
        "auto",
        "--cache_profile",
        profile,
    ]
    main(given(*words, "--infer_steps", STEPS, "--calibrate_steps", STEPS, "--error_budget", 0.001))
    (entry,) = read_profile(profile).entries
    assert entry.scale > 3 * SAFETY


def _lowered(entry: Entry) -> Entry:
    return replace(entry, errors=[replace(row, error=row.error / 1000) for row in entry.errors])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--calibrate_steps", 8], "--calibrate_steps 8 requires --step_cache auto"),
        (["--step_cache", "auto", "--cache_profile", "p.json", "--calibrate_steps", 8, "--infer_steps", 4], "differ"),
        (
            ["--step_cache", "auto", "--cache_profile", "p.json", "--calibrate_steps", 8, "--interactive"],
            "exclude each other",
        ),
        (["--step_cache", "auto", "--cache_profile", "none/p.json"], "cannot be read"),
        (["--step_cache", "attention", "--compile", "--compile_backend", "eager"], "does not work with --compile"),
    ],
)
def test_what_cannot_be_calibrated_or_cached_is_refused(
    words: list[object], told: str, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=told):
        prompt = [] if "--interactive" in words else ["--prompt", "a cat"]
        main(given(*prompt, "--save_path", "a.mp4", *words))
