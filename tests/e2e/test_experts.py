"""The two experts of Wan2.2 A14B, trained in one run and sampled together."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from generate.settings import TOOL as GENERATE
from tests import processes
from tests.e2e.test_images import frames_of
from tests.tiny.images import CLIP, make_image_models
from tests.tiny.make import DIT, SCENES, SIZE, T5, VAE, dit_shapes, draw_frames, draw_weight
from tests.unit.placement.test_states import Lane
from wan_train.cli import run
from wan_train.training.settings import TOOL as TRAIN

Tool = Callable[..., None]
PROMPT = "a blue square moves down"
HIGH, LOW = "high_noise_model.safetensors", "low_noise_model.safetensors"


class Desk:
    """A folder with two tiny experts and caches."""

    def __init__(self, folder: Path, run_tool: Tool) -> None:
        self.folder, self.run_tool = folder, run_tool

    def files(self, *, high: bool = True, low: bool = True) -> list[object]:
        return [
            *(("--dit", self.folder / LOW) if low else ()),
            *(("--dit_high_noise", self.folder / HIGH) if high else ()),
        ]

    def generating(self, name: str, *more: object, length: int = 5) -> list[object]:
        return [
            *("--task", "t2v-A14B", "--vae", self.folder / VAE, "--t5", self.folder / T5, "--video_size", *SIZE),
            *("--video_length", length, "--infer_steps", 4, "--flow_shift", 3, "--seed", 11, "--prompt", PROMPT),
            *("--save_path", self.folder / f"{name}.mp4", "--codec", "lossless", *self.files(), *more),
        ]

    def training(self, name: str, *more: object, high: bool = True, low: bool = True, steps: int = 6) -> list[object]:
        return [
            *("--task", "t2v-A14B", *self.files(high=high, low=low), "--dataset_config", self.folder / "data.toml"),
            *("--mixed_precision", "no", "--learning_rate", 1e-2, "--sdpa", "--seed", 1, "--log_with", "none"),
            *("--network_dim", 4, "--network_alpha", 4, "--max_data_loader_n_workers", 0, "--expert_steps", 2),
            *("--timestep_sampling", "shift", "--discrete_flow_shift", 8, "--max_train_steps", steps),
            *("--output_dir", self.folder / "out", "--output_name", name, *more),
        ]

    def train(self, name: str, *more: object, **options: bool | int) -> None:
        self.run_tool("wan_train_network.py", *self.training(name, *more, **options))  # type: ignore[arg-type]

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "out" / f"{name}.metrics.jsonl").read_text().splitlines()]

    def lora(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "out" / f"{name}.safetensors")

    def generate(self, name: str, *more: object) -> np.ndarray:
        self.run_tool("wan_generate_video.py", *self.generating(name, *more))
        return frames_of(self.folder / f"{name}.mp4")


@pytest.fixture(scope="module")
def desk(tiny: Path, tmp_path_factory: pytest.TempPathFactory, run_here: Tool) -> Desk:
    folder = tmp_path_factory.mktemp("experts") / "all"
    shutil.copytree(tiny, folder)
    data = folder / "data.toml"
    data.write_text(data.read_text().replace(str(tiny), str(folder)))
    for name, salt in ((HIGH, "high."), (LOW, "")):
        shapes = dit_shapes()
        save_file({key: draw_weight(salt + key, shape).bfloat16() for key, shape in shapes.items()}, folder / name)
    run_here("wan_cache_latents.py", "--dataset_config", data, "--vae", folder / VAE)
    run_here("wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--t5", folder / T5)
    return Desk(folder, run_here)


def test_each_expert_has_its_steps(desk: Desk) -> None:
    plain = desk.generate("plain")
    for more in (
        ("--timestep_boundary", 0.999),  # the low-noise expert alone but for the first step
        ("--timestep_boundary", 500),
        ("--guidance_scale_high_noise", 1),
        ("--guidance_scale", 1),
        ("--dit_high_noise", desk.folder / LOW),
    ):
        assert not np.array_equal(desk.generate("other", *more), plain)
    assert np.array_equal(desk.generate("same", "--timestep_boundary", 875, "--lazy_loading"), plain)
    # Never above 0.95 of noise: the expert for high noise is not asked, nor loaded.
    low = desk.generate("low", "--timesteps", "600,450,300,150", "--timestep_boundary", 0.95)
    assert np.array_equal(low, desk.generate("low", "--timesteps", "600,450,300,150", "--timestep_boundary", 0.96))


def test_a_video_is_made_again(desk: Desk) -> None:
    first = desk.generate("first", "--guidance_scale_high_noise", 2, "--timestep_boundary", 0.8)
    desk.run_tool("wan_generate_video.py", "--from_metadata", desk.folder / "first.mp4")
    assert np.array_equal(frames_of(desk.folder / "first_again.mp4"), first)


def test_what_the_generator_refuses(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    def told(words: list[object]) -> str:
        return told_by(GENERATE, words, capsys)

    words = desk.generating("no")
    without = [word for word in words if word not in ("--dit_high_noise", desk.folder / HIGH)]
    assert "--dit_high_noise is missing" in told(without)
    assert "--timestep_boundary" in told([*words, "--timestep_boundary", 1])
    single = [*without, "--task", "t2v-1.3B", "--dit", desk.folder / DIT]
    assert "has a single model" in told([*single, "--dit_high_noise", desk.folder / HIGH])
    assert "has a single model" in told([*single, "--timestep_boundary", 0.9])
    assert "--dit_high_noise" in told([*words, "--dit_high_noise", desk.folder / VAE])
    assert "merges one model" in told([*words, "--prompt", "", "--save_merged_model", desk.folder / "m.safetensors"])


def told_by(tool: Any, words: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line that a tool says which refuses."""
    assert run(tool, [str(word) for word in words]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def learnt(lora: dict[str, torch.Tensor]) -> bool:
    return any(bool(value.any()) for key, value in lora.items() if key.endswith("lora_up.weight"))


def test_two_adapters_and_two_files_in_one_run(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.train("pair", "--validation_split", 0.34, "--validate_every_n_steps", 6, "--network_dropout", 0.1)
    rows = [row for row in desk.rows("pair") if "loss" in row]
    assert [row["expert"] for row in rows] == [f"{e}_noise" for e in ("high", "high", "low", "low", "high", "high")]
    for row in rows:
        # Strata are eighths of t; shift 8 puts much of it above 7/8.
        assert set(row["strata"]) <= ({"t7"} if row["expert"] == "high_noise" else {f"t{n}" for n in range(7)})
    experts = [row["validation"]["experts"] for row in desk.rows("pair") if "validation" in row]
    assert all(set(each) == {"high_noise", "low_noise"} for each in experts) and len(experts) == 2
    high, low = desk.lora("pair_high_noise"), desk.lora("pair_low_noise")
    assert high.keys() == low.keys() and learnt(high) and learnt(low)
    assert not (desk.folder / "out" / "pair.safetensors").exists()
    (told,) = (line for line in caplog.messages if line.startswith("done: "))
    assert all(Path(word).is_file() for word in told.removeprefix("done: ").split(" and "))
    with safe_open(desk.folder / "out" / "pair_high_noise.safetensors", framework="pt") as file:
        assert file.metadata()["wan_train_expert"] == "high_noise"
        assert file.metadata()["ss_sd_model_name"] == HIGH


def test_the_idle_expert_stays_as_it_is(desk: Desk) -> None:
    """Momentum would carry it on: with six steps the low-noise expert takes the third and the fourth alone."""
    for steps in (2, 4, 6):
        desk.train(f"to{steps}", steps=steps)
    for key, value in desk.lora("to4_low_noise").items():
        assert torch.equal(desk.lora("to6_low_noise")[key], value)
    for key, value in desk.lora("to2_high_noise").items():
        assert torch.equal(desk.lora("to4_high_noise")[key], value)
    assert not learnt(desk.lora("to2_low_noise"))


@pytest.mark.parametrize(
    "options",
    [(), ("--shared_lora",), ("--offload_inactive_dit",), ("--blocks_to_swap", 1, "--gradient_checkpointing")],
)
def test_going_on_is_bit_equal(desk: Desk, options: tuple[object, ...]) -> None:
    rest = (*options, "--network_dropout", 0.1)
    desk.train("whole", *rest)
    desk.train("parts", *rest, "--save_every_n_steps", 3, "--save_state")
    state = desk.folder / "out" / "parts-step00000003-state"
    desk.train("parts", *rest, "--resume", state)
    endings = ("",) if "--shared_lora" in options else ("_high_noise", "_low_noise")
    for ending in endings:
        whole, parts = desk.lora(f"whole{ending}"), desk.lora(f"parts{ending}")
        assert all(torch.equal(parts[key], whole[key]) for key in whole) and learnt(whole)
    assert [r["loss"] for r in desk.rows("parts") if "loss" in r] == [
        r["loss"] for r in desk.rows("whole") if "loss" in r
    ]


def test_a_run_is_the_same_with_an_expert_and_the_averages_in_main_memory(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator whose copies are as late as they may be."""
    average = ("--ema_decay", 0.5, "--validation_split", 0.34, "--validate_every_n_steps", 2)
    desk.train("here", *average)
    lane = Lane()
    for maker in ("build", "experts.models"):
        monkeypatch.setattr(f"wan_train.training.{maker}.lane_from_host", lambda device: lane)
    desk.train("away", *average, "--offload_inactive_dit", "--ema_cpu")
    assert {"out", "back"} <= set(lane.events)
    for part in ("high_noise", "low_noise", "high_noise-ema", "low_noise-ema"):
        here, away = desk.lora(f"here_{part}"), desk.lora(f"away_{part}")
        assert all(torch.equal(away[key], here[key]) for key in here) and learnt(here)
    here_rows, away_rows = ([losses_of(row) for row in desk.rows(name)] for name in ("here", "away"))
    assert here_rows == away_rows


def losses_of(row: dict[str, Any]) -> dict[str, Any]:
    """The losses of a row of the metrics, of training and held-out."""
    return {key: value for key, value in row.items() if "loss" in key}


def test_previews_are_made_by_both_and_files_by_the_generator(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    (desk.folder / "prompts.txt").write_text(f"{PROMPT} --w {SIZE[0]} --h {SIZE[1]} --f 5 --s 4 --fs 3 --d 11\n")
    previews = ("--sample_prompts", desk.folder / "prompts.txt", "--sample_every_n_steps", 6, "--sample_at_first")
    desk.train("shown", "--vae", desk.folder / VAE, "--t5", desk.folder / T5, *previews)
    before, after = sorted((desk.folder / "out" / "sample").glob("shown_*.mp4"))
    assert not np.array_equal(frames_of(before), frames_of(after))
    high, low = (desk.folder / "out" / f"shown_{expert}_noise.safetensors" for expert in ("high", "low"))
    plain = desk.generate("plain")
    both = desk.generate("both", "--lora_weight", low, "--lora_weight_high_noise", high)
    assert not np.array_equal(both, plain)
    assert "was trained on the" not in caplog.text
    swapped = desk.generate("swapped", "--lora_weight", high, "--lora_weight_high_noise", low)
    assert not np.array_equal(swapped, both)
    assert caplog.text.count("was trained on the") == 2


@pytest.mark.parametrize(("high", "eighths"), [(True, {"t7"}), (False, {f"t{n}" for n in range(7)})])
def test_one_expert_is_trained_on_its_own_noise_levels(desk: Desk, *, high: bool, eighths: set[str]) -> None:
    desk.train("one", high=high, low=not high, steps=3)
    assert all(set(row["strata"]) <= eighths for row in desk.rows("one"))
    with safe_open(desk.folder / "out" / "one.safetensors", framework="pt") as file:
        assert file.metadata()["wan_train_expert"] == ("high_noise" if high else "low_noise")
    own = ("--min_timestep", 300, "--max_timestep", 400, "--allow_unused_timesteps")
    desk.train("own", *own, high=high, low=not high, steps=2)
    assert all(set(row["strata"]) <= {"t2", "t3"} for row in desk.rows("own"))


def test_one_file_at_high_noise_levels_is_the_expert_for_high_noise(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """The command of a trainer that has one option for either file."""
    levels = ("--min_timestep", 875, "--max_timestep", 1000)
    desk.train("alone", "--dit", desk.folder / HIGH, *levels, high=False, low=False, steps=2)
    assert "is the range of the high-noise expert" in caplog.text and "as --dit_high_noise" in caplog.text
    desk.train("same", *levels, low=False, steps=2)
    ours, named = desk.lora("alone"), desk.lora("same")
    assert learnt(ours) and all(torch.equal(ours[key], named[key]) for key in named)
    with safe_open(desk.folder / "out" / "alone.safetensors", framework="pt") as file:
        assert file.metadata()["wan_train_expert"] == "high_noise"
        assert file.metadata()["ss_sd_model_name"] == HIGH


def test_what_training_refuses(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    def told(words: list[object]) -> str:
        return told_by(TRAIN, words, capsys)

    assert "give --dit (low noise)" in told(desk.training("no", high=False, low=False))
    assert "--shared_lora" in told(desk.training("no", "--shared_lora", high=False))
    assert "--offload_inactive_dit" in told(desk.training("no", "--offload_inactive_dit", "--blocks_to_swap", 1))
    assert "high-noise expert" in told(desk.training("no", "--max_timestep", 800))
    line = told(desk.training("no", "--min_timestep", 300, "--max_timestep", 400, low=False))
    assert "from 300 to 400" in line and "from 875 to 1000" in line
    (desk.folder / "prompts.txt").write_text("a\n")
    previews = ("--sample_prompts", desk.folder / "prompts.txt", "--sample_at_first")
    files = ("--vae", desk.folder / VAE, "--t5", desk.folder / T5)
    assert "need both experts" in told(desk.training("no", *previews, *files, high=False))
    assert "--dit_high_noise" in told(desk.training("no", "--dit_high_noise", desk.folder / VAE))
    for more in (("--network_weights_high_noise", "x"), ("--offload_inactive_dit",)):
        assert more[0] in told(desk.training("no", *more, high=False))
    assert "--base_weights" in told(desk.training("no", "--base_weights", "x"))
    assert "averages the weights at every step" in told(desk.training("no", "--optimizer_type", "AdamWScheduleFree"))
    thin = ("--timestep_sampling", "sigmoid", "--sigmoid_scale", 0.1)
    assert "almost never samples from 875 to 1000" in told(desk.training("no", *thin))
    assert "--image_dropout_rate" in told(desk.training("no", "--image_dropout_rate", 0.1))


def test_going_on_from_files_and_their_averages(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.train("begun", "--ema_decay", 0.5, steps=4)
    high, low = (desk.folder / "out" / f"begun_{expert}_noise.safetensors" for expert in ("high", "low"))
    # The average of the one that rested is that of its own turn, not of what it rested at.
    desk.train("short", "--ema_decay", 0.5, steps=2)
    for key, value in desk.lora("short_high_noise-ema").items():
        assert torch.equal(desk.lora("begun_high_noise-ema")[key], value)
    caplog.clear()
    weights = ("--network_weights", low, "--network_weights_high_noise", high, "--learning_rate", 0)
    desk.train("same", *weights, steps=2)
    for expert in ("high", "low"):
        for key, value in desk.lora(f"begun_{expert}_noise").items():
            assert torch.equal(desk.lora(f"same_{expert}_noise")[key], value)
    desk.train("alone", "--network_weights", high, "--learning_rate", 0, low=False, steps=1)
    for key, value in desk.lora("begun_high_noise").items():
        assert torch.equal(desk.lora("alone")[key], value)
    assert "was trained on the" not in caplog.text
    desk.train("alone", "--network_weights", low, "--learning_rate", 0, low=False, steps=1)
    assert caplog.text.count("was trained on the") == 1


def test_two_processes_take_the_same_expert(desk: Desk) -> None:
    """Gone on from a state, two processes come to what they come to unbroken; no gradient is waited for in vain."""

    def train(name: str, *more: object) -> None:
        words = desk.training(name, "--network_dropout", 0.1, *more, steps=4)
        assert "INFO: done: " in processes.run("wan_train_network.py", *words, ranks=2).stderr

    train("whole2")
    train("parts2", "--save_every_n_steps", 3, "--save_state")
    for path in (desk.folder / "out").glob("parts2_*noise.safetensors"):
        path.unlink()
    train("parts2", "--resume", desk.folder / "out" / "parts2-step00000003-state")
    assert [row["expert"] for row in desk.rows("whole2")] == ["high_noise"] * 2 + ["low_noise"] * 2
    for expert in ("high_noise", "low_noise"):
        whole, parts = desk.lora(f"whole2_{expert}"), desk.lora(f"parts2_{expert}")
        assert all(torch.equal(parts[key], whole[key]) for key in whole) and learnt(whole)


def test_from_a_image_without_an_image_encoder(desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ("--task", "i2v-A14B")
    files: list[object] = []
    for flag, salt in (("--dit_high_noise", "high."), ("--dit", "")):
        shapes = dit_shapes(in_dim=36)
        path = tmp_path / f"i2v{flag}.safetensors"
        save_file({key: draw_weight(salt + key, shape).bfloat16() for key, shape in shapes.items()}, path)
        files += [flag, path]
    data = tmp_path / "data.toml"
    data.write_text((desk.folder / "data.toml").read_text().replace('/cache"', '/cache_i2v"'))
    desk.run_tool("wan_cache_latents.py", "--dataset_config", data, "--vae", desk.folder / VAE, *task)
    desk.run_tool("wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--t5", desk.folder / T5)
    (cached, *_) = sorted((desk.folder / "cache_i2v").glob("*_wan.safetensors"))
    assert {key.split("_")[1] for key in load_file(cached)} == {"5x8x12", "image"}
    desk.train("i2v", *task, *files, "--dataset_config", data, steps=3)
    assert learnt(desk.lora("i2v_high_noise"))
    frames = list(draw_frames(next(iter(SCENES)), size=(120, 80)))
    frames[0].save(tmp_path / "first.png")
    frames[-1].save(tmp_path / "other.png")
    make_image_models(tmp_path)
    # An image encoder that is not read is not in the way.
    words = (*task, *files, "--clip", tmp_path / CLIP, "--image_path")
    first = desk.generate("first", *words, tmp_path / "first.png")
    assert not np.array_equal(first, desk.generate("other", *words, tmp_path / "other.png"))
    # Caches of a first and a last frame have the same names and shapes, and are not these.
    caching = ("--dataset_config", data, "--vae", desk.folder / VAE)
    desk.run_tool("wan_cache_latents.py", *caching, "--task", "flf2v-14B", "--clip", tmp_path / CLIP)
    for more in ((), ("--trust_cache",)):
        line = told_by(TRAIN, desk.training("no", *task, *files, "--dataset_config", data, *more), capsys)
        assert "different images" in line


def test_killed_and_gone_on(desk: Desk) -> None:
    rest = ("--network_dropout", 0.1, "--ema_decay", 0.5, "--save_every_n_steps", 1, "--save_state")
    desk.train("unbroken", *rest, steps=8)
    process = processes.start("wan_train_network.py", *desk.training("killed", *rest, steps=8))
    metrics, deadline = desk.folder / "out" / "killed.metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.returncode == -signal.SIGKILL
    desk.train("killed", *rest, "--resume", "auto", steps=8)
    for ending in ("high_noise", "low_noise", "high_noise-ema", "low_noise-ema"):
        whole, killed = desk.lora(f"unbroken_{ending}"), desk.lora(f"killed_{ending}")
        assert all(torch.equal(killed[key], whole[key]) for key in whole) and learnt(whole)
    assert [row["step"] for row in desk.rows("killed")] == list(range(1, 9))
