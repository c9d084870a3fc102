"""How a case is made: a tool, its words, and how far its numbers may be from the CPU's.

`folder` has the models and clips of `workshop`, `out` is where a run writes to; FOLDER and OUT in words name them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cache_tools.settings import LATENTS_TOOL, TEXT_TOOL
from generate.settings import TOOL as GENERATE
from tests.device.workshop import EXPERTS, FRAMES, PROMPT, SIZE, data
from tests.tiny.images import CLIP, FLF2V, I2V
from tests.tiny.make import DIT, T5, VAE
from tests.tiny.vae22 import VAE22
from wan_train.cli import Tool
from wan_train.models.variants import VARIANTS
from wan_train.training.settings import TOOL as TRAIN

HALF = 0.03  # relative: bfloat16 has 8 bits, and the CPU computes in float32
QUANTISED = 0.1  # products of 8-bit numbers: where inputs differ by rounding, codes do
Words = tuple[object, ...]


@dataclass(frozen=True)
class Case:
    """A run of a tool: its words by (folder, out), the task whose caches it reads, and the largest relative difference
    to the CPU's numbers; None if the CPU's mean something else. `before` is a run on the CPU whose files it reads."""

    tool: Tool
    words: Callable[[Path, Path], Words]
    reads: str = ""
    within: float | None = HALF
    before: "Case | None" = None


DITS = {
    "i2v-14B": I2V,
    "flf2v-14B": FLF2V,
    "ti2v-5B": "ti2v.safetensors",
    "fun-control-1.3B": "fun-control-v1.1.safetensors",
    "i2v-14B-FC": "fun-control.safetensors",
    "fun-camera-1.3B": "fun-camera.safetensors",
    "vace-1.3B": "vace.safetensors",
    "fun-control-A14B": "fun-control-A14B.safetensors",
    "fun-camera-A14B": "fun-camera-A14B.safetensors",
    "fun-inp-A14B": "fun-inp-A14B.safetensors",
    "vace-fun-A14B": "vace.safetensors",
}


def dit_words(task: str, folder: Path, dit: str = "") -> Words:
    """Return the options that name a task's models, or the model `dit`."""
    name = dit or DITS.get(task, DIT)
    if not task.endswith("A14B"):
        return "--dit", folder / name
    if task in DITS:
        return "--dit", folder / name, "--dit_high_noise", folder / name
    low, high = EXPERTS["i2v-" if task.startswith("i2v") else ""]
    return "--dit", folder / low, "--dit_high_noise", folder / high


def vae_words(task: str, folder: Path) -> Words:
    return "--vae", folder / (VAE22 if task == "ti2v-5B" else VAE)


def clip_words(task: str, folder: Path) -> Words:
    return ("--clip", folder / CLIP) if VARIANTS[task].reads_clip else ()


def caching(task: str, *more: object, clips: bool = True) -> Case:
    """Encode the clips of a task, or their captions."""

    def words(folder: Path, out: Path) -> Words:
        config = ("--dataset_config", data(folder, task, cache=out))
        if not clips:
            return *config, "--t5", folder / T5, *more
        return *config, "--task", task, *vae_words(task, folder), *clip_words(task, folder), *more

    return Case(LATENTS_TOOL if clips else TEXT_TOOL, words)


def training(
    *more: object,
    task: str = "t2v-1.3B",
    dit: str = "",
    steps: int = 2,
    precision: str = "bf16",
    network: str = "networks.lora_wan",
    within: float | None = HALF,
    before: Case | None = None,
) -> Case:
    """Train for some steps; FOLDER in the words is the folder of the models."""

    def words(folder: Path, out: Path) -> Words:
        return (
            *("--task", task, *dit_words(task, folder, dit)),
            *("--dataset_config", data(folder, task), "--trust_cache", "--mixed_precision", precision, "--sdpa"),
            *("--learning_rate", 1e-3, "--seed", 1, "--log_with", "none", "--max_data_loader_n_workers", 0),
            *("--network_module", network, *(("--network_dim", 4, "--network_alpha", 4) if "lora" in network else ())),
            *("--max_train_steps", steps, "--output_dir", out, "--output_name", "run"),
            *filled_in(more, folder, out),
        )

    return Case(TRAIN, words, task, within, before)


def generating(
    *more: object,
    task: str = "t2v-1.3B",
    dit: str = "",
    length: int = FRAMES,
    within: float | None = HALF,
) -> Case:
    """Generate a video of two steps."""

    def words(folder: Path, out: Path) -> Words:
        return (
            *("--task", task, *dit_words(task, folder, dit)),
            *(*vae_words(task, folder), "--t5", folder / T5, *clip_words(task, folder), "--video_size", *SIZE),
            *("--video_length", length, "--infer_steps", 2, "--seed", 11, "--output_type", "both"),
            *("--save_path", out / "video.mp4", "--prompt", PROMPT, *filled_in(more, folder, out)),
        )

    return Case(GENERATE, words, within=within)


def filled_in(words: Words, folder: Path, out: Path) -> Words:
    return tuple(str(word).replace("FOLDER", folder.as_posix()).replace("OUT", out.as_posix()) for word in words)
