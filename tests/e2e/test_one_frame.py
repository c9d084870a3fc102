"""Images trained and made as one frame of several: where they are in time reaches the model on both sides."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.tiny.images import CLIP, FLF2V, I2V, TOKENS, WIDTH, make_image_models
from tests.tiny.make import SCENES, T5, VAE, draw_frames
from wan_train.cli import run
from wan_train.training.settings import TOOL as TRAIN

Tool = Callable[..., None]
SIZE = (48, 32)


class Desk:
    """Images with controls, and runs on them."""

    def __init__(self, folder: Path, run_tool: Tool) -> None:
        self.folder, self.run_tool = folder, run_tool

    def data(self, controls: str, target: int, *more: str, **keys: object) -> Path:
        lines = {
            "image_directory": '"after"',
            "control_directory": '"before"',
            "cache_directory": '"cache"',
            "fp_1f_clean_indices": controls,
            "fp_1f_target_index": target,
        }
        text = f'[general]\nresolution = [{SIZE[0]}, {SIZE[1]}]\ncaption_extension = ".txt"\n[[datasets]]\n'
        text += "\n".join(f"{key} = {value}" for key, value in (lines | keys).items())
        for name in ("after", "before", "cache"):
            text = text.replace(f'"{name}"', f'"{self.folder / name}"')
        path = self.folder / "data.toml"
        path.write_text(text + "\n")
        return path

    def cache(self, data: Path, task: str = "i2v-14B") -> None:
        files = ("--vae", self.folder / VAE, "--clip", self.folder / CLIP, "--vae_dtype", "fp32")
        words = ("--dataset_config", data, "--task", task, "--one_frame", *files)
        self.run_tool("wan_cache_latents.py", *words)
        self.run_tool("wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--t5", self.folder / T5)

    def training(self, data: Path, name: str, *more: object, task: str = "i2v-14B") -> list[object]:
        dit = {"i2v-14B": I2V, "flf2v-14B": FLF2V}[task]
        return [
            *("--task", task, "--dit", self.folder / dit, "--dataset_config", data, "--one_frame", "--sdpa"),
            *("--mixed_precision", "no", "--learning_rate", 1e-2, "--seed", 1, "--max_data_loader_n_workers", 0),
            *("--max_train_steps", 2, "--output_dir", self.folder / "out", "--output_name", name),
            *("--log_with", "none", *more),
        ]

    def losses(self, data: Path, name: str, *more: object, task: str = "i2v-14B") -> list[float]:
        self.run_tool("wan_train_network.py", *self.training(data, name, *more, task=task))
        lines = (self.folder / "out" / f"{name}.metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def generate(self, name: str, one_frame: str, *controls: str, task: str = "i2v-14B") -> np.ndarray:
        dit = {"i2v-14B": I2V, "flf2v-14B": FLF2V}[task]
        self.run_tool(
            "wan_generate_video.py",
            *("--task", task, "--dit", self.folder / dit, "--vae", self.folder / VAE, "--t5", self.folder / T5),
            *("--clip", self.folder / CLIP, "--video_size", *SIZE, "--infer_steps", 2, "--seed", 3),
            *("--prompt", "a blue square", "--one_frame_inference", one_frame),
            *("--control_image_path", *(self.folder / "before" / control for control in controls)),
            *("--save_path", self.folder / f"{name}.png"),
        )
        return np.asarray(Image.open(self.folder / f"{name}.png"))


@pytest.fixture(scope="module")
def desk(tiny: Path, tmp_path_factory: pytest.TempPathFactory, run_here: Tool) -> Desk:
    folder = tmp_path_factory.mktemp("one_frame") / "all"
    shutil.copytree(tiny, folder)
    make_image_models(folder)
    for name in ("before", "after"):
        (folder / name).mkdir()
    for number, caption in enumerate(SCENES):
        frames = list(draw_frames(caption, size=SIZE))
        frames[-1].save(folder / "after" / f"{number}.png")
        (folder / "after" / f"{number}.txt").write_text(caption)
        frames[0].save(folder / "before" / f"{number}_0.png")
        frames[12].save(folder / "before" / f"{number}_1.png")
    return Desk(folder, run_here)


def test_cached_as_users_have_it(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.cache(desk.data("[9, 0]", 4))
    tensors = load_file(desk.folder / "cache" / "0_0048x0032_wan.safetensors")
    assert tensors["f_indices_int32"].tolist() == [0, 4, 9]
    assert tensors["clip_float32"].shape == (2, TOKENS, WIDTH)
    latents, given = tensors["latents_3x4x6_float32"], tensors["latents_image_3x4x6_float32"]
    assert given.shape == (20, 3, 4, 6)
    assert given[:4, :, 0, 0].tolist() == [[1.0, 0.0, 1.0]] * 4
    assert torch.equal(latents[:, [0, 2]], given[4:, [0, 2]])
    assert not torch.equal(latents[:, 1], given[4:, 1])
    # The first control is at 9: the other way round the images change places.
    desk.cache(desk.data("[0, 9]", 4))
    other = load_file(desk.folder / "cache" / "0_0048x0032_wan.safetensors")
    assert torch.equal(other["latents_image_3x4x6_float32"][:, 0], given[:, 2])
    capsys.readouterr()
    desk.cache(desk.data("[0, 9]", 4))
    assert "0 encoded" in capsys.readouterr().err


def test_places_in_time_reach_training_and_generation(desk: Desk) -> None:
    rows = []
    for target in (1, 9):
        data = desk.data("[0]", target)
        desk.cache(data)
        rows.append(desk.losses(data, f"at_{target}", "--network_dim", 4, "--network_alpha", 4))
    assert rows[0][0] != rows[1][0]
    made = [desk.generate("made", f"control_index=0,target_index={target}", "0_0.png") for target in (1, 9)]
    assert made[0].shape == (SIZE[1], SIZE[0], 3)
    assert not np.array_equal(made[0], made[1])
    assert not np.array_equal(desk.generate("made", "control_index=0,target_index=1", "1_0.png"), made[0])


def test_between_two_images(desk: Desk) -> None:
    data = desk.data("[0, 8]", 4)
    desk.cache(data, "flf2v-14B")
    assert all(np.isfinite(desk.losses(data, "between", task="flf2v-14B")))
    made = desk.generate("between", "control_index=0;8,target_index=4", "0_0.png", "0_1.png", task="flf2v-14B")
    other = desk.generate("between", "control_index=0;8,target_index=4", "0_1.png", "0_0.png", task="flf2v-14B")
    assert not np.array_equal(made, other)


def test_previews_of_one_frame(desk: Desk) -> None:
    data = desk.data("[0]", 1)
    desk.cache(data)
    control = desk.folder / "before" / "0_0.png"
    line = f"a blue square --w 48 --h 32 --s 2 --d 3 --of control_index=0,target_index=1 --ci {control}\n"
    (desk.folder / "prompts.txt").write_text(line)
    files = ("--vae", desk.folder / VAE, "--t5", desk.folder / T5, "--clip", desk.folder / CLIP)
    desk.losses(data, "shown", *files, "--sample_prompts", desk.folder / "prompts.txt", "--sample_every_n_steps", 2)
    (preview,) = (desk.folder / "out" / "sample").glob("shown_*.png")
    assert Image.open(preview).size == SIZE


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"flip_augment": "true"}, "flip_augment"),
        ({"fp_1f_target_index": 0}, "fp_1f_target_index"),
        ({"control_directory": '"after"', "fp_1f_clean_indices": "[0, 2]"}, "fewer than 2 controls"),
    ],
)
def test_what_is_refused(desk: Desk, keys: dict[str, object], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = desk.data("[0]", 1, **keys)
    assert run(TRAIN, [str(word) for word in desk.training(data, "no")]) == 2
    assert told in capsys.readouterr().err
