"""The 5B of Wan2.2: text and image to video in one model, on latents of its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cache_tools.settings import LATENTS_TOOL
from generate.settings import TOOL as GENERATE
from tests.e2e.test_images import frames_of
from tests.tiny.make import DIT, SCENES, SIZE, T5, VAE, dit_shapes, draw_frames, save
from tests.tiny.vae22 import VAE22, vae22_shapes
from wan_train.cli import run
from wan_train.training.settings import TOOL as TRAIN

Tool = Callable[..., None]
PROMPT = "a blue square moves down"
DIT5 = "wan_ti2v_tiny.safetensors"
FILE = "blue_square_00000-017_0096x0064_wan.safetensors"


class Desk:
    """A folder with a tiny 5B and caches of it."""

    def __init__(self, folder: Path, run_tool: Tool) -> None:
        self.folder, self.run_tool = folder, run_tool

    def training(self, name: str, *more: object) -> list[object]:
        return [
            *("--task", "ti2v-5B", "--dit", self.folder / DIT5, "--dataset_config", self.folder / "data.toml"),
            *("--mixed_precision", "no", "--learning_rate", 1e-2, "--sdpa", "--seed", 1, "--log_with", "none"),
            *("--network_dim", 4, "--network_alpha", 4, "--max_data_loader_n_workers", 0, "--max_train_steps", 3),
            *("--output_dir", self.folder / "out", "--output_name", name, *more),
        ]

    def losses(self, name: str, *more: object) -> list[float]:
        self.run_tool("wan_train_network.py", *self.training(name, *more))
        lines = (self.folder / "out" / f"{name}.metrics.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    def generating(self, name: str, *more: object) -> list[object]:
        return [
            *("--task", "ti2v-5B", "--dit", self.folder / DIT5, "--vae", self.folder / VAE22, "--t5", self.folder / T5),
            *("--video_size", *SIZE, "--video_length", 9, "--infer_steps", 3, "--seed", 11, "--prompt", PROMPT),
            *("--save_path", self.folder / f"{name}.mp4", "--codec", "lossless", "--output_type", "both", *more),
        ]

    def generate(self, name: str, *more: object) -> np.ndarray:
        self.run_tool("wan_generate_video.py", *self.generating(name, *more))
        return frames_of(self.folder / f"{name}.mp4")

    def latent(self, name: str) -> torch.Tensor:
        return load_file(self.folder / f"{name}_latent.safetensors")["latent"]


@pytest.fixture(scope="module")
def desk(tiny: Path, tmp_path_factory: pytest.TempPathFactory, run_here: Tool) -> Desk:
    folder = tmp_path_factory.mktemp("ti2v") / "all"
    shutil.copytree(tiny, folder)
    data = folder / "data.toml"
    data.write_text(data.read_text().replace(str(tiny), str(folder)))
    save(folder / DIT5, dit_shapes(in_dim=48, channels=48), torch.bfloat16)
    save(folder / VAE22, vae22_shapes(), torch.float32)
    for index, frame in enumerate(draw_frames(next(iter(SCENES)), size=SIZE, num_frames=2)):
        frame.save(folder / f"{index}.png")
    words = ("--dataset_config", data, "--vae", folder / VAE22, "--task", "ti2v-5B", "--vae_dtype", "fp32")
    run_here("wan_cache_latents.py", *words)
    run_here("wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--t5", folder / T5)
    return Desk(folder, run_here)


def test_caches_hold_latents_alone(desk: Desk) -> None:
    tensors = load_file(desk.folder / "cache" / FILE)
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {"latents_5x4x6_float32": (48, 5, 4, 6)}


def test_text_and_image_in_one_training(desk: Desk) -> None:
    rows = {ratio: desk.losses(f"ratio{ratio}", "--i2v_ratio", ratio) for ratio in (0, 0.5, 1)}
    assert rows[0] != rows[1] and all(np.isfinite(values).all() for values in rows.values())
    # Each sample of the mixture is one or the other; with batches of one the first step tells.
    assert rows[0.5][0] in (rows[0][0], rows[1][0])
    held_out = ("--validation_split", 0.34, "--validate_every_n_steps", 3)
    measured = []
    for ratio in (0, 1):
        desk.losses(f"held{ratio}", "--i2v_ratio", ratio, *held_out)
        lines = (desk.folder / "out" / f"held{ratio}.metrics.jsonl").read_text().splitlines()
        measured.append(json.loads(lines[0])["validation"]["loss"])
    assert measured[0] != measured[1]  # each is measured on what it trains
    whole = desk.losses("whole", "--network_dropout", 0.1)
    desk.losses("parts", "--network_dropout", 0.1, "--save_every_n_steps", 2, "--save_state")
    went_on = desk.losses(
        "parts", "--network_dropout", 0.1, "--resume", desk.folder / "out" / "parts-step00000002-state"
    )
    assert went_on == whole


def test_previews_and_videos_with_a_image_and_without(desk: Desk) -> None:
    line = f"{PROMPT} --w {SIZE[0]} --h {SIZE[1]} --f 9 --s 2 --d 11"
    (desk.folder / "prompts.txt").write_text(f"{line}\n{line} --i {desk.folder / '0.png'}\n")
    files = ("--vae", desk.folder / VAE22, "--t5", desk.folder / T5, "--sample_prompts", desk.folder / "prompts.txt")
    desk.losses("shown", *files, "--sample_every_n_steps", 3)
    text, image = sorted((desk.folder / "out" / "sample").glob("shown_000003_*.mp4"))
    assert frames_of(text).shape == frames_of(image).shape == (9, SIZE[1], SIZE[0], 3)
    assert not np.array_equal(frames_of(text), frames_of(image))
    desk.generate("text")
    first = desk.generate("first", "--image_path", desk.folder / "0.png")
    desk.generate("merged", "--image_path", desk.folder / "0.png", "--cfg_merge")
    desk.generate("other", "--image_path", desk.folder / "1.png")
    # The first latent frame is the image's, whatever the steps made of the others.
    assert torch.equal(desk.latent("first")[:, 0], desk.latent("merged")[:, 0])
    assert not torch.equal(desk.latent("first")[:, 0], desk.latent("other")[:, 0])
    torch.testing.assert_close(desk.latent("first"), desk.latent("merged"), atol=1e-3, rtol=1e-3)
    assert not torch.equal(desk.latent("text")[:, 1:], desk.latent("first")[:, 1:])
    low = desk.generate("tiled", "--image_path", desk.folder / "0.png", "--vae_tiling", "--fp8_base", "--fp8_scaled")
    assert low.shape == first.shape
    desk.run_tool("wan_generate_video.py", "--from_metadata", desk.folder / "first.mp4")
    assert np.array_equal(frames_of(desk.folder / "first_again.mp4"), first)


def test_sizes_go_in_steps_of_32_and_videos_at_24(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    made = desk.generate("steps", "--video_size", 112, 80)
    assert made.shape[1:3] == (64, 96)
    assert "width and height must be multiples of 32" in caplog.text


def test_what_is_refused(desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(tool: object, words: list[object]) -> str:
        assert run(tool, [str(word) for word in words]) == 2  # type: ignore[arg-type]
        return capsys.readouterr().err.strip().splitlines()[-1]

    data = ["--dataset_config", desk.folder / "data.toml"]
    assert "give Wan2.2_VAE.pth" in told(GENERATE, desk.generating("no", "--vae", desk.folder / VAE))
    assert "--task ti2v-5B" in told(LATENTS_TOOL, [*data, "--vae", desk.folder / VAE22])
    assert "--task ti2v-5B" in told(GENERATE, desk.generating("no", "--task", "t2v-1.3B", "--vae", desk.folder / VAE))
    end = ("--end_image_path", desk.folder / "0.png")
    assert "only a first-frame image" in told(GENERATE, desk.generating("no", *end))
    both = (*end, "--image_path", desk.folder / "0.png")
    assert "only a first-frame image" in told(GENERATE, desk.generating("no", *both))
    one = ("--image_path", desk.folder / "0.png", "--video_length", 1)
    assert "would be the image itself" in told(GENERATE, desk.generating("no", *one))
    assert "Wan2.2_VAE.pth" in told(GENERATE, desk.generating("no", "--vae", ""))
    assert "--i2v_ratio" in told(TRAIN, desk.training("no", "--image_dropout_rate", 0.5))
    (desk.folder / "small.toml").write_text((desk.folder / "data.toml").read_text().replace("[96, 64]", "[24, 24]"))
    assert "at least 32" in told(TRAIN, [*desk.training("no"), "--dataset_config", desk.folder / "small.toml"])
    # Caches of one VAE are not the other's.
    line = told(TRAIN, [*desk.training("no"), "--task", "t2v-1.3B", "--dit", desk.folder / DIT])
    assert "different VAE, with 48 channels" in line
    line = told(TRAIN, [*desk.training("no"), "--task", "t2v-1.3B", "--dit", desk.folder / DIT, "--trust_cache"])
    assert "different VAE, with 48 channels" in line


def test_a_given_first_frame_stays_in_windows_over_time(desk: Desk) -> None:
    """Latents of three frames; timesteps per frame are cut along with them."""
    image = ("--image_path", desk.folder / "0.png", "--exact_size")
    desk.generate("whole", *image)
    desk.generate("windows", *image, "--sliding_window_size", 2, "--sliding_window_stride", 1)
    whole, windows = desk.latent("whole"), desk.latent("windows")
    assert torch.equal(windows[:, 0], whole[:, 0])
    assert not torch.equal(windows[:, 1:], whole[:, 1:]) and bool(windows.isfinite().all())
