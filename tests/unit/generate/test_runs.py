"""Runs over several jobs: what fails, what is kept, and which model is loaded when."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import generate.models
from generate.interactive import run_interactive
from generate.jobs import Job, make_jobs
from generate.latents import check_latents, decode_latents
from generate.models import Models
from generate.preflight import fitted_jobs
from generate.runs import InMemory, OnDisk, run_jobs
from generate.settings import GenerateSettings
from generate.text_cache import TextCache
from tests.unit.generate.conftest import Given
from wan_train.conditions.conditions import Conditions
from wan_train.errors import InputError, RunError
from wan_train.media_out import write_video
from wan_train.sampling.denoise import Sampling

CPU = torch.device("cpu")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat --d 1\na cat --d 2\na cat --d 1 --n dark\n")
    return path


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is loaded, in order."""
    names: list[str] = []
    for function in ("open_text_encoder", "assemble_dit", "open_vae"):
        plain = getattr(generate.models, function)

        def load(*given: Any, plain: Callable[..., Any] = plain, name: str = function, **more: Any) -> Any:
            names.append(name)
            return plain(*given, **more)

        monkeypatch.setattr(generate.models, function, load)
    return names


def run(settings: GenerateSettings) -> None:
    jobs = make_jobs(settings)
    run_jobs(jobs, Models(settings, {}, CPU), OnDisk(settings, {}, several=len(jobs) > 1))


def test_equal_prompts_with_other_seeds_or_negatives_give_other_videos(
    given: Given, prompts: Path, tmp_path: Path, loaded: list[str]
) -> None:
    run(given("--from_file", prompts, "--save_path", tmp_path / "{index}.mp4", "--output_type", "latent"))
    latents = [load_file(tmp_path / f"{i:03d}_latent.safetensors")["latent"] for i in range(3)]
    assert all((latents[a] - latents[b]).abs().max() > 1e-3 for a, b in ((0, 1), (0, 2), (1, 2)))
    assert loaded == ["open_text_encoder", "assemble_dit"]  # each once, and the VAE not at all


def test_a_job_that_fails_costs_itself_only(
    given: Given, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    advance = Sampling.advance

    def breaking(self: Sampling, *given: Any, **more: Any) -> None:
        if self.request.seed == 2:
            raise torch.OutOfMemoryError("no room\nat all")
        advance(self, *given, **more)

    monkeypatch.setattr(Sampling, "advance", breaking)
    with pytest.raises(RunError, match=r"1 of 3 videos failed \(video 1: no room\)"):
        run(given("--from_file", prompts, "--save_path", tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 2
    assert not list((tmp_path / "out").glob("*latent*"))
    assert "continuing with the others: no room" in capsys.readouterr().err


def test_latents_are_there_before_anything_is_decoded_and_can_be_decoded_later(
    given: Given, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = given("--from_file", prompts, "--save_path", tmp_path / "{index}.mp4", "--codec", "lossless")
    run(whole)
    monkeypatch.setattr(Models, "decode", lambda *given: (_ for _ in ()).throw(RuntimeError("the decoder broke")))
    broken = given("--from_file", prompts, "--save_path", tmp_path / "b_{index}.mp4", "--codec", "lossless")
    with pytest.raises(RunError, match="3 of 3 videos failed"):
        run(broken)
    monkeypatch.undo()
    left = sorted(tmp_path.glob("b_*"))
    assert [path.name for path in left] == [f"b_{i:03d}_pending_latent.safetensors" for i in range(3)]
    later = given("--latent_path", tmp_path, "--save_path", tmp_path / "later", "--codec", "lossless")
    decode_latents(check_latents(later.batch.latent_path, later.output), Models(later, {}, CPU))
    for index in range(3):
        # The same video with the same words about it; the name of the file is not in it.
        first, second = tmp_path / f"{index:03d}.mp4", tmp_path / "later" / f"b_{index:03d}.mp4"
        assert first.read_bytes() == second.read_bytes()


def test_each_model_is_gone_when_the_next_is_loaded(
    given: Given, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    for function in ("open_text_encoder", "open_vae", "assemble_dit"):
        plain = getattr(generate.models, function)

        def load(*given: Any, plain: Callable[..., Any] = plain, **more: Any) -> Any:
            assert [ref() for ref in alive] == [None] * len(alive)
            model = plain(*given, **more)
            alive.append(weakref.ref(model))
            return model

        monkeypatch.setattr(generate.models, function, load)
    write_video(tmp_path / "v.mp4", np.zeros((5, 32, 32, 3), dtype=np.uint8), fps=16)
    run(given("--from_file", prompts, "--save_path", tmp_path / "out", "--video_path", tmp_path / "v.mp4"))
    assert len(alive) == 4 and alive[-1]() is None  # the VAE twice


def test_a_job_alone_fails_as_it_fails(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(*given: object, **more: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Sampling, "advance", breaking)
    with pytest.raises(ZeroDivisionError):
        run(given("--prompt", "a", "--save_path", tmp_path / "a.mp4"))


def test_lines_from_the_keyboard_share_the_models(
    given: Given, tmp_path: Path, loaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = given("--interactive", "--save_path", tmp_path / "{index}.mp4")
    lines = iter(["a cat --d 1", "", "a cat --zz 3", "a cat --slg_layers 7", "a cat --d 2", "a dog --d 3 --f 1"])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    models = Models(settings, {}, CPU, keep=True)
    assert run_interactive(models, OnDisk(settings, {}, several=True), read=read) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"000.mp4", "001.mp4", "002.mp4"}
    assert loaded == ["open_text_encoder", "assemble_dit", "open_vae"]
    said = capsys.readouterr().err
    assert "--zz" in said and "blocks 0 to 1" in said


def test_a_line_that_breaks_costs_itself_only(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = given("--interactive", "--save_path", tmp_path)
    lines = iter(["a cat", "a dog"])
    monkeypatch.setattr(Sampling, "advance", lambda *_, **__: 1 / 0)
    models = Models(settings, {}, CPU, keep=True)

    def read(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    assert run_interactive(models, OnDisk(settings, {}, several=True), read=read) == 0
    assert capsys.readouterr().err.count("generation failed: division by zero") == 2


def test_the_text_cache_does_without_the_text_encoder(
    given: Given, tmp_path: Path, loaded: list[str], models: Path
) -> None:
    def frames(*words: object) -> np.ndarray:
        settings = given("--prompt", "a cat", "--seed", 1, *words)
        delivery = InMemory(settings.output)
        run_jobs(make_jobs(settings), Models(settings, {}, CPU), delivery)
        return delivery.frames[0]

    plain = frames()
    loaded.clear()
    first = frames("--text_cache", tmp_path / "cache")
    again = frames("--text_cache", tmp_path / "cache")
    assert loaded.count("open_text_encoder") == 1
    assert np.array_equal(plain, first) and np.array_equal(plain, again)
    other = given("--t5", models / "models_t5_umt5-xxl-enc-bf16.safetensors", "--fp8_t5").text
    assert TextCache(str(tmp_path / "cache"), other, CPU).find(["a cat"]) == {}


def test_a_cache_of_texts_gives_back_what_it_was_given(given: Given, tmp_path: Path) -> None:
    cache = TextCache(str(tmp_path), given().text, CPU)
    cache.keep({"a": Conditions((torch.randn(3, 4),)), "b": Conditions((torch.zeros(1, 4),))})
    assert set(cache.find(["a", "b", "c"])) == {"a", "b"}
    assert torch.equal(cache.find(["b"])["b"].context[0], torch.zeros(1, 4))
    assert TextCache(None, given().text, CPU).find(["a"]) == {}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--output_type", "both"), "which decodes"),
        (("--trim_tail_frames", 5), "less than the number of frames, 5"),
        (("--save_path", ""), "--save_path is missing"),
    ],
)
def test_what_cannot_be_decoded_is_refused(words: tuple[object, ...], told: str, given: Given, tmp_path: Path) -> None:
    save_file({"latent": torch.zeros(16, 2, 4, 4)}, tmp_path / "a_latent.safetensors")
    settings = given("--latent_path", tmp_path, "--save_path", tmp_path, *words)
    with pytest.raises(InputError, match=told):
        check_latents(settings.batch.latent_path, settings.output)


def test_a_name_that_is_too_long_is_refused_before_decoding_and_before_a_line_is_sampled(
    given: Given, tmp_path: Path, loaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    long = "n" * (255 - len("_latent.safetensors"))
    save_file({"latent": torch.zeros(16, 2, 4, 4)}, tmp_path / f"{long}_latent.safetensors")
    for name, kind in (("d" * 252 + ".mp4", "video"), ("d" * 247 + ".mp4", "images")):
        settings = given("--latent_path", tmp_path, "--save_path", tmp_path / name, "--output_type", kind)
        with pytest.raises(InputError, match="too long"):
            check_latents(settings.batch.latent_path, settings.output)
    settings = given("--interactive", "--save_path", tmp_path / ("{seed}" + "n" * 220 + ".mp4"))
    lines = iter(["a cat --d 1234567890123456789"])

    def read(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    assert run_interactive(Models(settings, {}, CPU, keep=True), OnDisk(settings, {}, several=True), read=read) == 0
    assert "too long" in capsys.readouterr().err and loaded == []


def test_files_that_hold_no_latents_are_refused(given: Given, tmp_path: Path, models: Path) -> None:
    save_file({"latent": torch.zeros(48, 2, 4, 4)}, tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    output = given("--save_path", tmp_path).output
    for path in (tmp_path / "other.safetensors", models / "wan_t2v_tiny.safetensors", tmp_path / "empty", "absent.pt"):
        with pytest.raises(InputError):
            check_latents([str(path)], output)


def test_latents_of_other_tools_have_a_batch_axis_and_a_name_of_their_own(given: Given, tmp_path: Path) -> None:
    save_file({"latent_tensor": torch.ones(1, 16, 2, 4, 4)}, tmp_path / "x.safetensors")
    (file,) = check_latents([str(tmp_path / "x.safetensors")], given("--save_path", tmp_path).output)
    assert file.read().shape == (16, 2, 4, 4) and file.name == "x"


def test_a_job_is_shown_in_a_few_words(given: Given) -> None:
    (job,) = make_jobs(given("--prompt", "x" * 60, "--seed", 1))
    assert job.label == f'video 0 ("{"x" * 39}…", seed 1)'
    assert isinstance(job, Job)


def test_a_line_of_too_few_frames_is_refused_and_what_one_leaves_is_told_and_kept(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = given("--interactive", "--save_path", tmp_path / "{index}.mp4", "--trim_tail_frames", 3)
    lines = iter(["a cat --f 1", "a cat", "a dog"])

    def read(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(Models, "decode", lambda *given: 1 / 0)
    assert run_interactive(Models(settings, {}, CPU, keep=True), OnDisk(settings, {}, several=True), read=read) == 0
    said = capsys.readouterr().err
    assert "less than the number of frames, 1" in said
    left = [f"{index:03d}_pending_latent.safetensors" for index in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert all(f"sampled but not decoded: {tmp_path / name}; decode with --latent_path" in said for name in left)


def test_latents_are_told_of_where_somebody_interrupts(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Models, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(given("--prompt", "a", "--save_path", tmp_path / "a.mp4"))
    assert "a_pending_latent.safetensors; decode with --latent_path" in capsys.readouterr().err


def test_a_damaged_text_in_the_cache_is_encoded_again(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = TextCache(str(tmp_path), given().text, CPU)
    cache.keep({"a": Conditions((torch.ones(1, 4),))})
    (path,) = tmp_path.iterdir()
    for content in (path.read_bytes()[:30], b""):
        path.write_bytes(content)
        assert cache.find(["a"]) == {} and "is damaged" in capsys.readouterr().err
    save_file({"other": torch.zeros(1)}, path)
    assert cache.find(["a"]) == {}


def test_places_for_decoded_latents(given: Given, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        save_file({"latent": torch.zeros(16, 2, 4, 4)}, tmp_path / folder / "a_latent.safetensors", {"seeds": "../7"})
    both = [str(tmp_path / folder) for folder in ("one", "two")]

    def check(place: str, paths: list[str]) -> None:
        check_latents(paths, given("--save_path", tmp_path / place).output)

    refused = {"out": "two files are named a", "{name}": "unknown placeholder", "x.png": "not one for 5 frames"}
    for place, told in refused.items():
        with pytest.raises(InputError, match=told):
            check(place, both if place == "out" else both[:1])
    check("{index}/sub", both)
    assert not (tmp_path / "{index}").exists()
    assert check_latents(both[:1], given("--save_path", tmp_path).output)[0].seed == "0"


def test_latents_begin_with_a_vae_that_is_one(given: Given, models: Path) -> None:
    words = ("--prompt", "a", "--video_path", "absent.mp4", "--output_type", "latent")
    for vae in ("", models / "wan_t2v_tiny.safetensors"):
        settings = given(*words, "--vae", vae)
        with pytest.raises(InputError, match=r"--vae|wan_t2v_tiny"):
            fitted_jobs(make_jobs(settings), settings)
