"""Tiny models, clips and caches of every task, made on the CPU in one folder."""

import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny.control import make_control_models
from tests.tiny.images import make_image_models
from tests.tiny.make import CLIPS, DIT, dit_shapes, draw_weight, make, save
from tests.tiny.vae22 import VAE22, vae22_shapes

SIZE = (64, 32)
FRAMES = 5
FOUR, SCALED = "four.safetensors", "four_fp8_scaled.safetensors"
PROMPT = "a blue square moves down"
VIDEO = "blue_square.mp4"
PROMPTS, PRIOR = "previews.txt", "prior.txt"
EXPERTS = {"": ("low.safetensors", "high.safetensors"), "i2v-": ("i2vlow.safetensors", "i2vhigh.safetensors")}
# What the clips of a task have beside their captions.
KEYS = {
    "fun-control-1.3B": 'control_directory = "{0}/controls"\nreference_directory = "{0}/references"\n',
    "i2v-14B-FC": 'control_directory = "{0}/controls"\n',
    "fun-camera-1.3B": 'camera_direction = "LeftUp"\ncamera_speed = 0.02\n',
    "fun-control-A14B": 'control_directory = "{0}/controls"\n',
    "fun-camera-A14B": 'camera_direction = "In"\n',
    "vace-fun-A14B": 'control_directory = "{0}/controls"\n',
    "vace-1.3B": 'control_directory = "{0}/controls"\nreference_directory = "{0}/references"\n',
}


def make_all(folder: Path) -> None:
    """Write everything that the cases need to a folder that does not exist yet."""
    make(folder)
    make_image_models(folder)
    make_control_models(folder)
    save(folder / DIT, dit_shapes(num_layers=2), torch.bfloat16)
    save(folder / FOUR, dit_shapes(num_layers=4), torch.bfloat16)
    save(folder / "ti2v.safetensors", dit_shapes(in_dim=48, channels=48), torch.bfloat16)
    save(folder / VAE22, vae22_shapes(), torch.float32)
    for prefix, in_dim in (("", 16), ("i2v-", 36)):
        for name, salt in zip(EXPERTS[prefix], ("", "high."), strict=True):
            shapes = dit_shapes(num_layers=2, in_dim=in_dim)
            save_file({key: draw_weight(salt + key, shape).bfloat16() for key, shape in shapes.items()}, folder / name)
    save_file(_scaled_fp8(), folder / SCALED)
    _write_controls(folder)
    _write_texts(folder)


def data(folder: Path, task: str, *, cache: Path | None = None) -> Path:
    """Write the data TOML of a task into the folder of its caches; return its path."""
    cache = cache or folder / f"cache_{task}"
    cache.mkdir(exist_ok=True)
    path = cache / "data.toml"
    keys = KEYS.get(task, "").format(folder.as_posix())
    path.write_text(
        f'[general]\nresolution = [{SIZE[0]}, {SIZE[1]}]\ncaption_extension = ".txt"\nbatch_size = 1\n'
        f'[[datasets]]\nvideo_directory = "{folder.as_posix()}/clips"\ncache_directory = "{cache.as_posix()}"\n'
        f'target_frames = [{FRAMES}]\nframe_extraction = "head"\n{keys}',
        encoding="utf-8",
    )
    return path


def _scaled_fp8() -> dict[str, Tensor]:
    """Return the four-block DiT in fp8 with one scale per matrix, as ComfyUI stores it."""
    tensors: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, shape in dit_shapes(num_layers=4).items():
        weight = draw_weight(key, shape)
        if not (key.startswith("blocks.") and key.endswith(".weight") and len(shape) == 2):
            tensors[key] = weight.bfloat16()
            continue
        scale = weight.abs().max() / 448
        tensors[key] = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[key.removesuffix(".weight") + ".scale_weight"] = scale.reshape(1)
    return tensors


def _write_controls(folder: Path) -> None:
    clips = sorted((folder / CLIPS).glob("*.mp4"))
    for name in ("controls", "references"):
        (folder / name).mkdir()
    for clip, other in zip(clips, clips[1:] + clips[:1], strict=True):
        shutil.copy(other, folder / "controls" / clip.name)
        Image.effect_noise((40, 40), 90).convert("RGB").save(folder / "references" / f"{clip.stem}.png")


def _write_texts(folder: Path) -> None:
    preview = f"{PROMPT} --w {SIZE[0]} --h {SIZE[1]} --f {FRAMES} --s 1 --d 1 --l 3.0\n"
    (folder / PROMPTS).write_text(preview, encoding="utf-8")
    (folder / PRIOR).write_text("a blue square\n", encoding="utf-8")
