"""Files that say how they were made."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from generate.jobs import make_jobs
from generate.output import check_output, latent_metadata, save_latents
from generate.record import compare_hashes, input_hashes, make_record, model_hashes, read_record
from generate.settings import GenerateSettings
from tests.unit.generate.conftest import Given
from wan_train.cli import parse
from wan_train.distributed.settings import ParallelSettings
from wan_train.errors import InputError
from wan_train.media_out import write_image, write_images, write_video
from wan_train.profiling.settings import ProfileSettings
from wan_train.sampling.request import STRENGTH
from wan_train.sampling.settings import SamplingSettings

FRAMES = np.zeros((5, 32, 32, 3), dtype=np.uint8)
WORDS = (
    *("--prompt", "a cat", "--seed", 5, "--fps", 8, "--save_path", "x.mp4", "--blocks_to_swap", 1, "--vae_tiling"),
    *("--slg_layers", "1", "--slg_end", 0.5, "--lora_mode", "attach", "--no_metadata", "--text_cache", "somewhere"),
)


def write_all(folder: Path, comment: str) -> list[Path]:
    paths = [folder / name for name in ("v.mp4", "p.png", "many", "l.safetensors")]
    write_video(paths[0], FRAMES, fps=16, comment=comment)
    write_image(paths[1], FRAMES[0], comment=comment)
    write_images(paths[2], FRAMES, comment=comment)
    save_latents(paths[3], torch.zeros(16, 1, 4, 4), comment, {"seeds": "5"})
    return paths


def test_every_kind_of_file_gives_the_settings_back(given: Given, tmp_path: Path) -> None:
    settings = given(*WORDS)
    (job,) = make_jobs(settings)
    comment = make_record(settings, job.request, {"dit": "1"}).text()
    for path in write_all(tmp_path, comment):
        again = parse(GenerateSettings, ["--from_metadata", str(path)])
        assert [made.request for made in make_jobs(again)] == [replace(job.request, shift=job.request.noise_shift)]
        for group in ("dit", "weights", "stream", "activations", "compile", "vae", "text", "lora"):
            assert getattr(again, group) == getattr(settings, group)
        assert again.output.fps == 8
        suffix = ".png" if path.suffix == ".png" else ".mp4"
        assert again.output.save_path == str(path.with_name(f"{path.stem}_again{suffix}"))
        # Where it was made and what it was allowed to say belong to the command, not to the video.
        assert not again.output.no_metadata and again.output.text_cache is None and again.output.device is None


def test_windows_and_caches_are_recorded_as_they_acted(given: Given, tmp_path: Path) -> None:
    settings = given(
        *("--prompt", "a cat", "--seed", 5, "--save_path", "x.mp4", "--sliding_window_size", 3, "--riflex"),
        *("--riflex_freq_index", 4, "--step_cache", "auto", "--cache_profile", "profile.json", "--error_budget", 0.1),
    )
    (job,) = make_jobs(settings)
    path = write_all(tmp_path, make_record(settings, job.request, {}).text())[0]
    (again,) = make_jobs(parse(GenerateSettings, ["--from_metadata", str(path)]))
    recorded = {"shift": job.request.noise_shift, "sliding_window_stride": job.request.window_stride}
    assert again.request == replace(job.request, **recorded)


def test_processes_and_traces_belong_to_the_command(given: Given, tmp_path: Path) -> None:
    """A video of several processes is made again by one, and by as many as are asked for."""
    sizes = ("--ulysses_size", 2, "--ring_size", 2, "--cfg_size", 2, "--data_parallel", 2)
    settings = given(*WORDS, *sizes, "--dit_fsdp", "--t5_fsdp", "--vae_parallel", "--profile", "traces")
    (job,) = make_jobs(settings)
    path = write_all(tmp_path, make_record(settings, job.request, {}).text())[0]
    again = parse(GenerateSettings, ["--from_metadata", str(path)])
    assert (again.parallel, again.profile) == (ParallelSettings(), ProfileSettings())
    words = ["--from_metadata", str(path), "--ulysses_size", "4"]
    assert parse(GenerateSettings, words).parallel == ParallelSettings(ulysses_size=4)


def test_what_is_given_beside_wins(given: Given, tmp_path: Path) -> None:
    settings = given(*WORDS)
    (job,) = make_jobs(settings)
    path = write_all(tmp_path, make_record(settings, job.request, {}).text())[0]
    words = ["--from_metadata", str(path), "--seed", "6", "--save_path", "y.mp4", "--infer_steps", "9"]
    again = parse(GenerateSettings, words)
    assert (again.sampling.seed, again.sampling.infer_steps, again.output.save_path) == (6, 9, "y.mp4")
    assert again.sampling.prompt == "a cat"


@pytest.mark.parametrize(
    ("recorded", "beside"),
    [
        (("camera_direction", "camera_speed", "camera_origin"), ("camera_path", "c.txt")),
        (("camera_path",), ("camera_direction", "In")),
    ],
)
def test_a_camera_given_beside_takes_the_place_of_the_recorded_one(
    recorded: tuple[str, ...], beside: tuple[str, str], tmp_path: Path
) -> None:
    said = {"camera_path": "old.txt", "camera_direction": "Left", "camera_speed": 0.5, "camera_origin": [0.0] * 19}
    options = {"task": "fun-camera-1.3B", "prompt": "a cat", **{name: said[name] for name in recorded}}
    path = write_all(tmp_path, json.dumps({"wan_train": "0.1.0", "options": options, "hashes": {}}))[0]
    sampling = parse(GenerateSettings, ["--from_metadata", str(path), f"--{beside[0]}", beside[1]]).sampling
    assert getattr(sampling, beside[0]) == beside[1]
    assert all(getattr(sampling, name) == getattr(SamplingSettings, name) for name in recorded)


@pytest.mark.parametrize(
    ("words", "cache"),
    [
        (("--step_cache", "none"), "none"),
        (("--step_cache=none",), "none"),
        (("--use_attentioncache",), "attention"),
        (("--step_cache", "teacache"), "teacache"),
    ],
)
def test_a_cache_given_beside_takes_the_place_of_the_recorded_one(
    words: tuple[str, ...], cache: str, given: Given, tmp_path: Path
) -> None:
    settings = given(*WORDS, "--step_cache", "teacache", "--tea_cache_l1_thresh", 0.3)
    (job,) = make_jobs(settings)
    path = write_all(tmp_path, make_record(settings, job.request, {}).text())[0]
    (again,) = make_jobs(parse(GenerateSettings, ["--from_metadata", str(path), *words]))
    assert again.request.step_cache == cache
    assert again.request.tea_cache_l1_thresh == (0.3 if cache == "teacache" else 0.05)


def test_files_without_a_record_are_refused(tmp_path: Path) -> None:
    bad = [*write_all(tmp_path, ""), tmp_path / "absent.mp4", tmp_path]
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "other").mkdir()
    write_image(tmp_path / "other" / "x.png", FRAMES[0], comment=json.dumps({"options": 3}))
    for path in [*bad, tmp_path / "text.mp4", tmp_path / "other"]:
        with pytest.raises(InputError):
            read_record(str(path))


def test_an_option_that_is_not_known_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "x.png", FRAMES[0], comment=json.dumps({"options": {"promt": "x"}, "hashes": {}}))
    with pytest.raises(InputError, match="promt; did you mean prompt"):
        parse(GenerateSettings, ["--from_metadata", str(tmp_path / "x.png")])


def test_another_model_is_told(given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = given(*WORDS)
    (job,) = make_jobs(settings)
    hashes = model_hashes(settings)
    assert set(hashes) == {"dit", "vae", "t5"}
    path = str(write_all(tmp_path, make_record(settings, job.request, hashes).text())[0])
    compare_hashes(path, hashes)
    assert capsys.readouterr().err == ""
    compare_hashes(path, hashes | {"vae": "other"})
    assert "--vae is not the file" in capsys.readouterr().err


def test_a_image_that_has_changed_is_told(tmp_path: Path, given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "first.png", FRAMES[0])
    settings = given("--prompt", "a", "--task", "i2v-14B", "--image_path", tmp_path / "first.png")
    (job,) = make_jobs(settings)
    path = str(write_all(tmp_path, make_record(settings, job.request, {}).text())[0])
    compare_hashes(path, input_hashes(settings.sampling))
    assert capsys.readouterr().err == ""
    write_image(tmp_path / "first.png", FRAMES[0] + 9)
    compare_hashes(path, input_hashes(settings.sampling))
    assert "--image_path is not the file" in capsys.readouterr().err


def test_a_latent_file_without_a_record_says_nothing(tmp_path: Path, given: Given) -> None:
    (job,) = make_jobs(given("--prompt", "secret"))
    save_latents(tmp_path / "l.safetensors", torch.zeros(16, 1, 4, 4), "", latent_metadata(job.request))
    assert b"secret" not in (tmp_path / "l.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("kind", "name", "again"),
    [
        ("both", "a_latent.safetensors", "a_again.mp4"),
        ("video", "a_pending_latent.safetensors", "a_again.mp4"),
        ("latent_images", "many/many_000.png", "many/many_000_again.mp4"),
        ("images", "v1.5", "v1.5_again.mp4"),
        ("both", "p.png", "p_again.png"),
        ("video", "a.mov", "a_again.mp4"),
    ],
)
def test_the_place_of_the_new_one_suits_the_type(
    kind: str, name: str, again: str, given: Given, tmp_path: Path
) -> None:
    settings = given(*WORDS, "--output_type", kind)
    (job,) = make_jobs(settings)
    comment = make_record(settings, job.request, {}).text()
    paths = {path.name: path for path in write_all(tmp_path, comment)}
    given_kinds = {".mov": "v.mp4", ".safetensors": "l.safetensors"}
    old = tmp_path / name
    if old.suffix in given_kinds:
        paths[given_kinds[old.suffix]].rename(old)
    elif name == "v1.5":
        paths["many"].rename(old)
    settings = parse(GenerateSettings, ["--from_metadata", str(old)])
    assert settings.output.save_path == str(tmp_path / again)
    check_output(settings.output, [])


def test_the_folder_that_one_is_in_can_be_named_by_a_dot(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = given(*WORDS, "--output_type", "images")
    (job,) = make_jobs(settings)
    write_all(tmp_path, make_record(settings, job.request, {}).text())
    monkeypatch.chdir(tmp_path / "many")
    assert parse(GenerateSettings, ["--from_metadata", "."]).output.save_path == str(tmp_path / "many_again.mp4")


def test_what_a_line_says_is_recorded_and_not_what_it_stands_over(given: Given, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("a cat --d 1 --s 3 --cfg_merge false\na dog --d 2 --slg_end 0.9\n")
    settings = given(
        *("--from_file", lines, "--timesteps", "999.98765,500.5", "--cfg_merge", "--slg_layers", 1, "--slg_end", 1),
        *("--denoising_strength", 0.5),
    )
    for job in make_jobs(settings):
        path = tmp_path / "p.png"
        write_image(path, FRAMES[0], comment=make_record(settings, job.request, {}).text())
        (again,) = make_jobs(parse(GenerateSettings, ["--from_metadata", str(path)]))
        shift = job.request.noise_shift
        # The strength is of a video that is not there.
        assert again.request == replace(job.request, denoising_strength=STRENGTH, shift=shift)
