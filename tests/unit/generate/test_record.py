"""Files that say how they were made."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from generate.jobs import make_jobs
from generate.output import latent_metadata, save_latents
from generate.record import compare_hashes, make_record, model_hashes, read_record
from generate.settings import GenerateSettings
from tests.unit.generate.conftest import Given
from wan_train.cli import InputError, parse
from wan_train.media_out import write_image, write_images, write_video

FRAMES = np.zeros((5, 32, 32, 3), dtype=np.uint8)
WORDS = (
    *("--prompt", "a cat", "--seed", 5, "--fps", 8, "--save_path", "x.mp4", "--blocks_to_swap", 1, "--vae_tiling"),
    *("--slg_layers", "1", "--lora_mode", "attach", "--no_metadata", "--text_cache", "somewhere"),
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
        assert [made.request for made in make_jobs(again)] == [job.request]
        for group in ("dit", "weights", "stream", "activations", "compile", "vae", "text", "lora"):
            assert getattr(again, group) == getattr(settings, group)
        assert again.output.fps == 8
        assert again.output.save_path == str(path.with_name(f"{path.stem}_again{path.suffix}"))
        # Where it was made and what it was allowed to say belong to the command, not to the video.
        assert not again.output.no_metadata and again.output.text_cache is None and again.output.device is None


def test_what_is_given_beside_wins(given: Given, tmp_path: Path) -> None:
    settings = given(*WORDS)
    (job,) = make_jobs(settings)
    path = write_all(tmp_path, make_record(settings, job.request, {}).text())[0]
    words = ["--from_metadata", str(path), "--seed", "6", "--save_path", "y.mp4", "--infer_steps", "9"]
    again = parse(GenerateSettings, words)
    assert (again.sampling.seed, again.sampling.infer_steps, again.output.save_path) == (6, 9, "y.mp4")
    assert again.sampling.prompt == "a cat"


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


def test_a_latent_file_without_a_record_says_nothing(tmp_path: Path, given: Given) -> None:
    (job,) = make_jobs(given("--prompt", "secret"))
    save_latents(tmp_path / "l.safetensors", torch.zeros(16, 1, 4, 4), "", latent_metadata(job.request))
    assert b"secret" not in (tmp_path / "l.safetensors").read_bytes()
