"""The generator as a user runs it: batches, video to video, merged models, and making a video again."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import wan_train
from tests.tiny.make import CLIPS, DIT, T5, VAE
from wan_train.models.loading import linear_shapes

Tool = Callable[..., subprocess.CompletedProcess[str]]


def words(tiny: Path) -> list[object]:
    return [
        *("--task", "t2v-1.3B", "--dit", tiny / DIT, "--vae", tiny / VAE, "--t5", tiny / T5),
        *("--video_size", 64, 48, "--video_length", 5, "--infer_steps", 3, "--codec", "lossless"),
    ]


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def lora(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on every Linear of the blocks, strong enough to be seen."""
    path, draw = tmp_path_factory.mktemp("lora") / "lora.safetensors", torch.Generator().manual_seed(0)
    rows = {}
    for name, (out, width) in linear_shapes(tiny / DIT).items():
        if name.startswith("blocks."):
            key = f"lora_unet_{name.replace('.', '_')}"
            rows[f"{key}.lora_down.weight"] = torch.randn(4, width, generator=draw) / width**0.5
            rows[f"{key}.lora_up.weight"] = torch.randn(out, 4, generator=draw) / 2
            rows[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(rows, path)
    return path


def test_a_video_is_made_again_from_what_it_says(tiny: Path, lora: Path, tmp_path: Path, run_tool: Tool) -> None:
    first = tmp_path / "first.mp4"
    run_tool(
        "wan_generate_video.py",
        *(*words(tiny), "--prompt", "a blue square", "--negative_prompt", "a --d 3", "--save_path", first),
        *("--lora_weight", lora, "--lora_multiplier", 0.8, "--slg_layers", "1", "--slg_end", "0.7"),
        *("--cfg_skip_mode", "late", "--cfg_apply_ratio", 0.7, "--sample_solver", "dpm++", "--fps", 8),
    )  # no seed: one is drawn
    done = run_tool("wan_generate_video.py", "--from_metadata", first)
    assert "the result will differ" not in done.stderr
    assert np.array_equal(frames_of(tmp_path / "first_again.mp4"), frames_of(first))
    other = tmp_path / "other.mp4"
    run_tool("wan_generate_video.py", "--from_metadata", first, "--seed", 1, "--save_path", other)
    assert not np.array_equal(frames_of(other), frames_of(first))


def test_a_merged_checkpoint_is_the_model_with_the_lora(tiny: Path, lora: Path, tmp_path: Path, run_tool: Tool) -> None:
    merged = tmp_path / "merged.safetensors"
    done = run_tool(
        "wan_generate_video.py",
        *("--task", "t2v-1.3B", "--dit", tiny / DIT, "--lora_weight", lora, "--save_merged_model", merged),
    )
    assert f"wrote {merged}" in done.stderr
    common = [*words(tiny), "--prompt", "a red circle", "--seed", 4]
    run_tool("wan_generate_video.py", *common, "--lora_weight", lora, "--save_path", tmp_path / "lora.mp4")
    run_tool("wan_generate_video.py", *common, "--dit", merged, "--save_path", tmp_path / "merged.mp4")
    run_tool("wan_generate_video.py", *common, "--save_path", tmp_path / "plain.mp4")
    shown = {name: frames_of(tmp_path / f"{name}.mp4") for name in ("lora", "merged", "plain")}
    assert np.array_equal(shown["lora"], shown["merged"])
    assert not np.array_equal(shown["lora"], shown["plain"])


def test_video_to_video_keeps_what_it_is_not_told_to_make_anew(tiny: Path, tmp_path: Path, run_tool: Tool) -> None:
    clip = tiny / CLIPS / "red_circle.mp4"
    made = {}
    for strength in (0.01, 0.5, 1.0):
        path = tmp_path / f"{strength}.mp4"
        run_tool(
            "wan_generate_video.py",
            *(*words(tiny), "--prompt", "a red circle", "--seed", 2, "--guidance_scale", 1, "--save_path", path),
            *("--video_path", clip, "--denoising_strength", strength, "--flow_shift", 1),
        )
        made[strength] = frames_of(path).astype(float)
    near, half, far = (np.abs(made[strength] - made[0.01]).mean() for strength in (0.01, 0.5, 1.0))
    assert near == 0 < half < far


def test_lines_of_a_file_and_of_the_keyboard(tiny: Path, tmp_path: Path, run_tool: Tool) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --d 1\n# not this\na cat --d 2 --f 1 --sample_solver lcm --timesteps 1000,500\n")
    run_tool(
        "wan_generate_video.py", *words(tiny), "--from_file", prompts, "--save_path", tmp_path / "{index}_{seed}.mp4"
    )
    assert frames_of(tmp_path / "000_1.mp4").shape == (5, 48, 64, 3)
    assert frames_of(tmp_path / "001_2.mp4").shape == (1, 48, 64, 3)
    typed = ("--interactive", "--save_path", tmp_path / "typed", "--output_type", "latent")
    done = run_tool("wan_generate_video.py", *words(tiny), *typed, stdin="a cat --d 1\nwhat? --zz\na dog --d 1\n")
    assert len(list((tmp_path / "typed").glob("*_latent.safetensors"))) == 2
    assert done.stderr.count("loading") == 1


def test_the_python_call_of_the_docs(tiny: Path, tmp_path: Path, run_tool: Tool, root: Path) -> None:
    """The example in docs/generation.md, with the tiny files in place of the published ones."""
    page = (root / "docs" / "generation.md").read_text(encoding="utf-8")
    (example,) = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    for published, here in (
        ("wan2.1_t2v_1.3B_bf16.safetensors", tiny / DIT),
        ("Wan2.1_VAE.pth", tiny / VAE),
        ("models_t5_umt5-xxl-enc-bf16.pth", tiny / T5),
        ("(832, 480)", "(64, 48)"),
        ("video_length=81", "video_length=5"),
        ("infer_steps=20", "infer_steps=3"),
        ("cat.mp4", tmp_path / "cat.mp4"),
    ):
        assert published in example
        example = example.replace(published, str(here))
    names: dict[str, np.ndarray] = {}
    exec(example, names)
    assert names["frames"].shape == (5, 48, 64, 3) and names["frames"].dtype == np.uint8
    assert (tmp_path / "cat.mp4").is_file()
    path = tmp_path / "same.mp4"
    run_tool("wan_generate_video.py", *words(tiny), "--prompt", "a cat in the rain", "--seed", 1, "--save_path", path)
    assert np.array_equal(frames_of(path), names["frames"])


def test_the_python_call_refuses_what_it_cannot_do(tiny: Path) -> None:
    for settings, told in (
        ({"save_path": "x.mp4"}, "save_path is for output files"),
        ({"promt": 1}, "promt"),
        ({"dit": "absent.safetensors"}, "absent.safetensors"),
        ({"infer_steps": "many"}, "many"),
        ({"seed": 2**64}, "--seed"),
        ({"trim_tail_frames": 5}, "less than the number of frames, 5"),
    ):
        with pytest.raises(ValueError, match=told):
            wan_train.generate("a cat", **(calling(tiny) | settings))


def test_lists_in_the_python_call(tiny: Path) -> None:
    whole = wan_train.generate("a cat", **calling(tiny), timesteps=[1000, 500], slg_layers=[0, 1], slg_end=1)
    written = wan_train.generate("a cat", **calling(tiny), timesteps="1000,500", slg_layers="0,1", slg_end=1)
    assert whole.shape == (5, 48, 64, 3) and np.array_equal(whole, written)


def calling(tiny: Path) -> dict[str, Any]:
    files = {"dit": tiny / DIT, "vae": tiny / VAE, "t5": tiny / T5}
    return files | {"task": "t2v-1.3B", "video_size": [64, 48], "video_length": 5, "seed": 1}


def test_latents_are_the_bytes_of_the_video(tiny: Path, tmp_path: Path, run_tool: Tool) -> None:
    """`both`, and the latents decoded afterwards."""
    both, again = tmp_path / "x.mp4", tmp_path / "again"
    common = [*words(tiny), "--prompt", "a cat", "--seed", 1, "--output_type", "both", "--save_path", both]
    run_tool("wan_generate_video.py", *common)
    latent = tmp_path / "x_latent.safetensors"
    assert load_file(latent)["latent"].shape == (16, 2, 6, 8)
    done = run_tool(
        "wan_generate_video.py",
        *("--latent_path", latent, "--vae", tiny / VAE, "--save_path", again, "--codec", "lossless"),
    )
    assert np.array_equal(frames_of(again / "x.mp4"), frames_of(both))
    assert "GiB of CPU RAM" in done.stderr
