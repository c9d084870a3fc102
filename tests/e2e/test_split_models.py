"""The generator with weights and frames split over processes makes the video that one process makes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import processes
from tests.e2e.test_generator import frames_of, words
from tests.tiny.make import CLIPS

SPLIT = ("--dit_fsdp", "--t5_fsdp", "--vae_parallel")


def make_both(tiny: Path, folder: Path, ranks: int, *sizes: object) -> None:
    """A video from a clip, so that the VAE encodes and decodes; with a prompt cached, and then decoded once more."""
    clip = next((tiny / CLIPS).glob("*.mp4"))
    command = (*words(tiny), "--prompt", "a red circle", "--negative_prompt", "blue", "--video_path", clip)
    command = (*command, "--denoising_strength", 0.8, "--seed", 1, "--output_type", "both", "--slg_layers", 1)
    processes.run("wan_generate_video.py", *command, "--save_path", folder / "one")
    split = (*command, *sizes, *SPLIT)
    cache = ("--text_cache", folder / "texts")
    for name in ("several", "again"):  # the second time finds the texts
        done = processes.run("wan_generate_video.py", *split, *cache, "--save_path", folder / name, ranks=ranks)
        assert ("encoding 2 prompts" in done.stderr) == (name == "several")
    (latents,) = (folder / "several").glob("*_latent.safetensors")
    decoding = (*words(tiny), *sizes, "--vae_parallel", "--latent_path", latents, "--save_path", folder / "decoded")
    processes.run("wan_generate_video.py", *decoding, ranks=ranks)


def compare(folder: Path) -> None:
    def latents(name: str) -> torch.Tensor:
        (path,) = (folder / name).glob("*_latent.safetensors")
        return load_file(path)["latent"]

    def frames(name: str) -> np.ndarray:
        (path,) = (folder / name).glob("*.mp4")
        return frames_of(path).astype(int)

    right = latents("one")
    assert (latents("several") - right).norm() < 1e-5 * right.norm()
    assert torch.equal(latents("again"), latents("several"))
    assert frames("one").std() > 1
    for name in ("several", "again", "decoded"):
        assert np.abs(frames(name) - frames("one")).max() <= 1


def test_two_processes_make_what_one_makes(tiny: Path, tmp_path: Path) -> None:
    make_both(tiny, tmp_path, 2, "--ulysses_size", 2)
    compare(tmp_path)


@pytest.mark.slow
def test_four_processes_in_two_halves_make_what_one_makes(tiny: Path, tmp_path: Path) -> None:
    make_both(tiny, tmp_path, 4, "--ulysses_size", 2, "--cfg_size", 2)
    compare(tmp_path)
