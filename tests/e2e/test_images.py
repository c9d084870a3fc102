"""Image-to-video and first-and-last frame, from cache to video, as a user runs them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cache_tools.settings import LATENTS_TOOL
from generate import interactive
from generate.settings import TOOL as GENERATE
from tests.tiny.images import CLIP, FIRST, FLF2V, I2V, LAST, image_dit_shapes, make_image_models
from tests.tiny.make import DIT, SIZE, T5, VAE, draw_weight
from wan_train.cli import run
from wan_train.training.settings import TOOL as TRAIN

Tool = Callable[..., None]
PROMPT = "a blue square moves down"
MODELS = {"i2v-14B": I2V, "flf2v-14B": FLF2V}


class Desk:
    """A folder with the tiny models for images and clips; caches of a task go into a folder of its own."""

    def __init__(self, folder: Path, run_tool: Tool) -> None:
        self.folder, self.run_tool = folder, run_tool

    def data(self, task: str, **keys: str) -> Path:
        path = self.folder / f"{task}.toml"
        text = (self.folder / "data.toml").read_text().replace('/cache"', f'/cache_{task}"')
        path.write_text(text + "".join(f"{key} = {value}\n" for key, value in keys.items()))
        return path

    def images(self, task: str) -> list[object]:
        both = ("--end_image_path", self.folder / LAST) if task == "flf2v-14B" else ()
        return ["--image_path", self.folder / FIRST, *both]

    def cache(self, task: str, *more: object, **keys: str) -> None:
        data = self.data(task, **keys)
        files = ("--vae", self.folder / VAE, "--clip", self.folder / CLIP)
        self.run_tool("wan_cache_latents.py", "--dataset_config", data, "--task", task, *files, *more)
        self.run_tool("wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--t5", self.folder / T5)

    def training(self, task: str, name: str, *more: object, steps: int = 4) -> list[object]:
        return [
            *("--task", task, "--dit", self.folder / MODELS[task], "--dataset_config", self.folder / f"{task}.toml"),
            *("--mixed_precision", "no", "--learning_rate", 2e-2, "--seed", 1, "--network_dim", 4),
            *("--network_alpha", 4, "--max_data_loader_n_workers", 0, "--max_train_steps", steps, "--sdpa"),
            *("--output_dir", self.folder / "out", "--output_name", name, "--log_with", "none", *more),
        ]

    def train(self, task: str, name: str, *more: object, steps: int = 4) -> dict[str, torch.Tensor]:
        self.run_tool("wan_train_network.py", *self.training(task, name, *more, steps=steps))
        return load_file(self.folder / "out" / f"{name}.safetensors")

    def losses(self, name: str) -> list[float]:
        lines = (self.folder / "out" / f"{name}.metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def generating(self, task: str, name: str, *more: object, length: int = 5) -> list[object]:
        return [
            *(
                "--task",
                task,
                "--dit",
                self.folder / MODELS[task],
                "--vae",
                self.folder / VAE,
                "--t5",
                self.folder / T5,
            ),
            *("--clip", self.folder / CLIP, "--video_size", *SIZE, "--video_length", length, "--infer_steps", 2),
            *("--seed", 11, "--save_path", self.folder / f"{name}.mp4", "--codec", "lossless", *more),
        ]

    def generate(self, task: str, name: str, *more: object, length: int = 5) -> np.ndarray:
        words = self.generating(task, name, "--prompt", PROMPT, *self.images(task), *more, length=length)
        self.run_tool("wan_generate_video.py", *words)
        return frames_of(self.folder / f"{name}.mp4")


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def desk(tiny: Path, tmp_path_factory: pytest.TempPathFactory, run_here: Tool) -> Desk:
    folder = tmp_path_factory.mktemp("images") / "all"
    shutil.copytree(tiny, folder)
    make_image_models(folder)
    data = folder / "data.toml"
    data.write_text(data.read_text().replace(str(tiny), str(folder)))
    made = Desk(folder, run_here)
    for task in MODELS:
        made.cache(task)
        words = " ".join(map(str, made.images(task))).replace("--image_path", "--i").replace("--end_image_path", "--ei")
        line = f"{PROMPT} --w {SIZE[0]} --h {SIZE[1]} --f 5 --s 2 --d 11 {words}\n"
        (folder / f"{task}.txt").write_text(line)
    return made


@pytest.mark.parametrize("task", MODELS)
def test_cached_trained_previewed_resumed_and_generated(desk: Desk, task: str) -> None:
    previews = (
        *("--sample_prompts", desk.folder / f"{task}.txt", "--sample_every_n_steps", 4),
        *("--vae", desk.folder / VAE, "--t5", desk.folder / T5, "--clip", desk.folder / CLIP),
    )
    name = task.partition("-")[0]
    whole = desk.train(task, name, *previews, "--network_dropout", 0.1)
    assert all(np.isfinite(desk.losses(name)))
    trained = {key.split(".")[0] for key, value in whole.items() if key.endswith("lora_up.weight") and value.any()}
    assert {f"lora_unet_blocks_1_cross_attn_{part}" for part in ("q", "k", "v", "o", "k_img", "v_img")} <= trained
    assert len(trained) == 24
    (preview,) = (desk.folder / "out" / "sample").glob(f"{name}_000004_00_*_11.mp4")
    assert frames_of(preview).shape == (5, SIZE[1], SIZE[0], 3)

    state = ("--save_every_n_steps", 2, "--save_state", "--network_dropout", 0.1)
    desk.train(task, "parts", *state)
    went_on = desk.train(
        task, "parts", "--network_dropout", 0.1, "--resume", desk.folder / "out" / "parts-step00000002-state"
    )
    assert all(torch.equal(went_on[key], whole[key]) for key in whole)

    lora = ("--lora_weight", desk.folder / "out" / f"{name}.safetensors")
    plain, merged = desk.generate(task, "plain"), desk.generate(task, "merged", *lora)
    assert plain.shape == merged.shape == (5, SIZE[1], SIZE[0], 3)
    assert not np.array_equal(plain, merged)


@pytest.mark.parametrize(
    "options",
    [
        ("--gradient_checkpointing", "--blocks_to_swap", 3),
        ("--recompute", "keep_attention", "--split_attn"),
        ("--gradient_checkpointing", "--gradient_checkpointing_cpu_offload", "--ffn_chunks", 2),
        ("--fp8_base", "--fp8_scaled"),
        ("--int8_base",),
    ],
)
def test_low_memory(desk: Desk, options: tuple[object, ...]) -> None:
    shapes = image_dit_shapes(num_layers=4)
    path = desk.folder / "four.safetensors"
    if not path.is_file():
        save_file({name: draw_weight(name, shape).bfloat16() for name, shape in shapes.items()}, path)
        desk.train("i2v-14B", "four", "--dit", path, steps=3)
    desk.train("i2v-14B", "saving", "--dit", path, *options, steps=3)
    exact = not any("8" in str(option) for option in options) and "--ffn_chunks" not in options
    for ours, plain in zip(desk.losses("saving"), desk.losses("four"), strict=True):
        assert ours == (plain if exact else pytest.approx(plain, rel=0.02))
    words = (
        "--dit",
        path,
        *(option for option in options if "8" in str(option) or "swap" in str(option) or option == 3),
    )
    assert desk.generate("i2v-14B", "saving", *words).shape == (5, SIZE[1], SIZE[0], 3)


def test_each_line_has_images_of_its_own(desk: Desk, tmp_path: Path) -> None:
    Image.new("RGB", (80, 120), "#2fae4d").save(tmp_path / "tall.png")
    wide, tall = desk.folder / FIRST, tmp_path / "tall.png"
    end = f"--ei {desk.folder / LAST}"
    options = [f"--i {wide}", f"--i {tall}", f"--i {wide} {end}", f"--i {tall} --exact_size", f"--i {wide} --h 512"]
    lines = [f"{PROMPT} {option} --f 5" for option in options]
    (tmp_path / "prompts.txt").write_text("\n".join(lines[:4]) + "\n")
    words = desk.generating(
        "i2v-14B", "x", "--from_file", tmp_path / "prompts.txt", "--save_path", tmp_path / "{index}.mp4"
    )
    desk.run_tool("wan_generate_video.py", *words)
    made = [frames_of(tmp_path / f"{index:03d}.mp4") for index in range(4)]
    width, height = SIZE
    assert [video.shape[1:3] for video in made] == [(height, width), (width, height), (height, width), (height, width)]
    assert all(not np.array_equal(made[0], made[index]) for index in (2, 3))
    first = tmp_path / "000.mp4"
    desk.run_tool("wan_generate_video.py", "--from_metadata", first)
    assert np.array_equal(frames_of(tmp_path / "000_again.mp4"), made[0])


def test_lines_from_the_keyboard_have_images_of_their_own(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"{PROMPT} --d 1 --i {desk.folder / name}" for name in (FIRST, LAST, FIRST)]
    # What fails costs its line only.
    typed = iter([lines[0], PROMPT, *lines[1:]])
    monkeypatch.setattr(interactive.run_interactive, "__kwdefaults__", {"read": lambda prompt: next(typed, None)})
    words = desk.generating("i2v-14B", "x", "--interactive", "--save_path", tmp_path / "{index}.mp4")
    desk.run_tool("wan_generate_video.py", *words)
    first, other, again = (frames_of(tmp_path / f"{index:03d}.mp4") for index in range(3))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_dropping_images_and_mirrored_clips(desk: Desk) -> None:
    """Trained always without images, the image's keys get no gradient that depends on it; mirrored clips have
    conditions of their own."""
    desk.cache("i2v-14B", flip_augment="true")
    files = list((desk.folder / "cache_i2v-14B").glob("*_wan.safetensors"))
    for file in files:
        tensors = load_file(file)
        kinds = {re.sub(r"(_\d+x\d+x\d+)?_[a-z]+\d+$", "", key) for key in tensors}
        assert kinds == {"latents", "latents_image", "clip", "latents_flipped", "latents_image_flipped", "clip_flipped"}
    desk.train("i2v-14B", "with")
    desk.train("i2v-14B", "without", "--image_dropout_rate", 1)
    desk.train("i2v-14B", "half", "--image_dropout_rate", 0.5)
    rows = [desk.losses(name) for name in ("with", "without", "half")]
    assert rows[0] != rows[1]
    assert rows[2] not in rows[:2]
    assert all(value in (rows[0][0], rows[1][0]) for value in rows[2][:1])


@pytest.fixture
def refused(desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a tool that must say one line and end with 2 before it fills a model."""

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    for module in ("loading", "vae.vae", "encoders.text_files", "encoders.image"):
        monkeypatch.setattr(f"wan_train.models.{module}.fill", forbidden)

    def check(tool: str, words: list[object]) -> str:
        tools = {"train": TRAIN, "generate": GENERATE, "latents": LATENTS_TOOL}
        assert run(tools[tool], [str(word) for word in words]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(said) == 1
        return said[0]

    return check


def test_what_the_generator_refuses(desk: Desk, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "text.png").write_text("no image")
    whole = (desk.folder / FIRST).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])

    def line(task: str, *more: object, images: bool = True) -> str:
        given = desk.images(task) if images else []
        return refused("generate", desk.generating(task, "no", "--prompt", PROMPT, *given, *more))

    assert "--image_path" in line("i2v-14B", images=False)
    assert "--end_image_path" in line("flf2v-14B", "--image_path", desk.folder / FIRST, images=False)
    assert "--clip" in line("i2v-14B", "--clip", "")
    assert "--clip" in line("i2v-14B", "--clip", desk.folder / VAE)
    for name in ("absent.png", "text.png", "cut.png"):
        assert name in line("i2v-14B", "--image_path", tmp_path / name)
        assert name in line("flf2v-14B", "--end_image_path", tmp_path / name)
    assert "--task t2v-1.3B" in line("i2v-14B", "--dit", desk.folder / DIT)
    assert "--task flf2v-14B" in line("i2v-14B", "--dit", desk.folder / FLF2V)
    assert "--task i2v-14B" in line("flf2v-14B", "--dit", desk.folder / I2V)
    words = desk.generating("i2v-14B", "no", "--prompt", PROMPT, "--task", "t2v-1.3B", "--dit", desk.folder / DIT)
    assert "--image_path" in refused("generate", [*words, *desk.images("i2v-14B")])
    (tmp_path / "lines.txt").write_text(f"{PROMPT} --i {desk.folder / FIRST}\n{PROMPT}\n")
    assert "line 2" in refused("generate", desk.generating("i2v-14B", "no", "--from_file", tmp_path / "lines.txt"))


def test_what_training_and_caching_refuse(desk: Desk, tmp_path: Path, refused: Callable[..., str]) -> None:
    desk.cache("i2v-14B")
    of_other = {task: ["--dataset_config", desk.folder / f"{task}.toml"] for task in MODELS}
    line = refused("train", [*desk.training("flf2v-14B", "no"), *of_other["i2v-14B"]])
    assert "wan_cache_latents.py" in line and "--task flf2v-14B" in line and "--clip" in line
    assert "--task i2v-14B" in refused("train", [*desk.training("i2v-14B", "no"), *of_other["flf2v-14B"]])
    line = refused("train", [*desk.training("i2v-14B", "no", "--trust_cache"), *of_other["flf2v-14B"]])
    assert "different images" in line
    bare = desk.data("t2v-1.3B")
    shutil.copytree(desk.folder / "cache_i2v-14B", desk.folder / "cache_t2v-1.3B", dirs_exist_ok=True)
    for path in (desk.folder / "cache_t2v-1.3B").glob("*_wan.safetensors"):
        save_file({key: value for key, value in load_file(path).items() if key.startswith("latents_3")}, path)
    assert "--task i2v-14B --clip" in refused("train", [*desk.training("i2v-14B", "no"), "--dataset_config", bare])
    prompts = ("--sample_prompts", desk.folder / "i2v-14B.txt", "--sample_at_first")
    files = ("--vae", desk.folder / VAE, "--t5", desk.folder / T5)
    assert "--clip" in refused("train", desk.training("i2v-14B", "no", *prompts, *files))
    (tmp_path / "bare.txt").write_text("a cat\n")
    bare_prompts = ("--sample_prompts", tmp_path / "bare.txt", "--sample_at_first")
    line = refused("train", desk.training("i2v-14B", "no", *bare_prompts, *files, "--clip", desk.folder / CLIP))
    assert "line 1" in line and "--i " in line
    caching = ["--dataset_config", bare, "--vae", desk.folder / VAE]
    assert "--clip" in refused("latents", [*caching, "--task", "i2v-14B"])
    assert "--clip" in refused("latents", [*caching, "--task", "t2v-1.3B", "--clip", desk.folder / CLIP])
    assert VAE in refused("latents", [*caching, "--task", "i2v-14B", "--clip", desk.folder / VAE])
