"""A preview is the video that the generator makes with the LoRA attached; what merging and patterns change."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from generate import models as generate_models
from generate.settings import TOOL
from tests.tiny.make import DIT, SIZE, T5, VAE
from wan_train.cli import run
from wan_train.storage import save_tensors
from wan_train.training.reporting import preview

Tool = Callable[..., None]
PROMPT = "a blue square moves down"
WIDTH, HEIGHT = SIZE


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory, run_here: Tool) -> Path:
    """Caches, and a LoRA of two steps with previews of the last one, one of them of one frame."""
    made = tmp_path_factory.mktemp("modes") / "all"
    shutil.copytree(tiny, made)
    data = made / "data.toml"
    data.write_text(data.read_text().replace(str(tiny), str(made)))
    (made / "prompts.toml").write_text(
        f'[prompt]\nwidth = {WIDTH}\nheight = {HEIGHT}\nsample_steps = 2\nseed = 11\nprompt = "{PROMPT}"\n'
        "[[prompt.subset]]\nframe_count = 5\n[[prompt.subset]]\nframe_count = 1\n"
    )
    run_here("wan_cache_latents.py", "--dataset_config", data, "--vae", made / VAE)
    run_here("wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--t5", made / T5)
    command = [
        *("--task", "t2v-1.3B", "--dit", made / DIT, "--dataset_config", data, "--vae", made / VAE, "--t5", made / T5),
        *("--mixed_precision", "no", "--learning_rate", 2e-2, "--network_dim", 3, "--network_alpha", 1.3, "--seed", 1),
        *("--network_dropout", 0.2, "--max_data_loader_n_workers", 0, "--max_train_steps", 2),
        *("--output_dir", made / "out", "--output_name", "name", "--log_with", "none"),
        *("--sample_prompts", made / "prompts.toml", "--sample_every_n_steps", 2),
    ]
    decode, previews = preview.decode_frames, []

    def keep(vae: Any, latents: torch.Tensor, device: torch.device) -> Any:
        """What previews decode and get, too: the video encoder does not always write the same bytes."""
        frames = list(decode(vae, latents, device))
        previews.append({"latents": latents, "frames": torch.from_numpy(np.stack(frames))})
        save_tensors(made / f"preview_{len(previews) - 1}.safetensors", previews[-1])
        return iter(frames)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "decode_frames", keep)
        run_here("wan_train_network.py", *command)
    return made


def arguments(folder: Path, name: str, *more: object, length: int = 5, lora: bool = True) -> list[object]:
    return [
        *("--task", "t2v-1.3B", "--video_size", *SIZE, "--video_length", length, "--infer_steps", 2, "--seed", 11),
        *("--prompt", PROMPT, "--save_path", folder / f"{name}.mp4", "--output_type", "both"),
        *("--dit", folder / DIT, "--vae", folder / VAE, "--t5", folder / T5, "--device", "cpu"),
        *(("--lora_weight", folder / "out" / "name.safetensors") if lora else ()),
        *more,
    ]


def generate(folder: Path, name: str, *more: object, **options: Any) -> torch.Tensor:
    """In this process: latents. On one thread, as the training was: sums of several come in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _generate(folder, name, *more, **options)
    finally:
        torch.set_num_threads(threads)


def _generate(folder: Path, name: str, *more: object, **options: Any) -> torch.Tensor:
    assert run(TOOL, [str(word) for word in arguments(folder, name, *more, **options)]) == 0
    return load_file(folder / f"{name}_latent.safetensors")["latent"]


@pytest.mark.parametrize(("index", "length"), [(0, 5), (1, 1)])
def test_a_preview_is_the_generators_video_bit_for_bit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, index: int, length: int
) -> None:
    decoded, decode = [], generate_models.decode_frames
    monkeypatch.setattr(
        generate_models, "decode_frames", lambda *given: decoded.append(list(decode(*given))) or iter(decoded[-1])
    )
    latents = generate(folder, "attached", "--lora_mode", "attach", length=length)
    preview = load_file(folder / f"preview_{index}.safetensors")
    assert torch.equal(latents, preview["latents"])
    assert torch.equal(torch.from_numpy(np.stack(decoded[0])), preview["frames"])
    assert len(list((folder / "out" / "sample").glob(f"name_000002_{index:02d}_*_11.*"))) == 1


def test_merging_does_nearly_the_same_and_both_do_something(folder: Path) -> None:
    merged, attached = generate(folder, "merged"), generate(folder, "attached", "--lora_mode", "attach")
    plain = generate(folder, "plain", lora=False)
    # Merging rounds the sum to the weights' bf16.
    assert 0 < (merged - attached).norm() < 0.2 * (attached - plain).norm(), (
        (merged - attached).norm(),
        (attached - plain).norm(),
    )


@pytest.mark.parametrize("mode", ["merge", "attach"])
def test_patterns_choose_what_acts(folder: Path, mode: str) -> None:
    both = ("--lora_mode", mode)
    whole, plain = generate(folder, "whole", *both), generate(folder, "plain", lora=False)
    some = generate(folder, "some", *both, "--include_patterns", r"blocks\.0\.", "ffn")
    rest = generate(folder, "rest", *both, "--exclude_patterns", r"self_attn\.(q|k)", "cross_attn")
    for different in (whole, plain, rest):
        assert not torch.equal(some, different)
    everything = generate(
        folder, "every", *both, "--include_patterns", ".", "--exclude_patterns", "lora_unet_blocks_0_ffn"
    )
    all_but = generate(folder, "all_but", *both, "--exclude_patterns", r"^blocks\.0\.ffn")
    assert torch.equal(everything, all_but)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--include_patterns", "nowhere"), "--include_patterns: 'nowhere' matches none"),
        (("--exclude_patterns", "("), "--exclude_patterns: .* is not a valid regular expression"),
        (("--exclude_patterns", "."), "select none"),
        (("--lora_mode", "both"), "--lora_mode"),
    ],
)
def test_patterns_that_cannot_be_are_refused(
    folder: Path, more: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(TOOL, [str(word) for word in arguments(folder, "refused", *more)]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert not (folder / "refused.mp4").exists()


def test_patterns_without_a_lora_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(folder, "refused", "--include_patterns", "ffn", lora=False)
    assert run(TOOL, [str(word) for word in words]) == 2
    assert "give at least one LoRA file" in capsys.readouterr().err
