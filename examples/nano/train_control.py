"""Make a control model from the small one, as `--init_control` does, and test whether its shapes follow an outline.

    python examples/nano/train_control.py [FOLDER] [--minutes 12] [--clips 4]

The additional layers of Wan2.1-Fun-Control are added to the small model, and its weights are trained on drawn
clips, each with the outline of its shape as the control. Then the generator makes videos for captions and outlines that
not seen in training, with the outline and without. Model, videos and losses are in FOLDER (control/); an
interrupted run resumes where it stopped. The last line gives the share of the videos that follow their outline.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.nano.demo_report import read
from examples.nano.judge import follows
from examples.nano.measure import choose_held_out
from examples.nano.names import DIT, T5, VAE
from examples.nano.pretrain import save_dit
from examples.nano.state import Trail
from examples.nano.train_dit import CONFIG, DitSettings, Samples, pad_captions, train_dit
from examples.nano.world import FPS, FRAMES, SIZE, Scene, draw, draw_outline, training_scenes
from wan_train.media_out import write_video
from wan_train.models.dit.dit import Dit
from wan_train.models.encoders.text import load_text_encoder
from wan_train.models.init_control import initialised, new_layers
from wan_train.models.vae.vae import load_vae
from wan_train.models.variants import VARIANTS
from wan_train.storage import read_header, read_tensors

MODEL = Path(__file__).resolve().parent
ROOT = MODEL.parents[1]
TASK = "fun-control-1.3B"
PAIRS = 60
FIRST_SEED = 5_000_000  # of the clips to judge; not used by training clips
SAMPLING = (
    *("--video_size", str(SIZE), str(SIZE), "--video_length", str(FRAMES), "--infer_steps", "20"),
    *("--flow_shift", "3", "--guidance_scale", "2", "--negative_prompt", "", "--codec", "lossless"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "control")
    parser.add_argument("--minutes", type=float, default=12.0, help="training time (wall-clock)")
    parser.add_argument("--clips", type=int, default=4, help="clips per scene")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    train(folder, minutes=given.minutes, clips=given.clips)
    scenes = choose_held_out(PAIRS)
    print(json.dumps({way: share(folder, scenes, way) for way in ("with", "without")}))
    return 0


def train(folder: Path, *, minutes: float, clips: int) -> None:
    """Add the layers, train, and write the model unless it exists."""
    if (folder / DIT).is_file():
        return
    path = MODEL / DIT
    shapes = {name: tuple(shape) for name, shape in read_header(path).shapes.items()}
    new = new_layers(shapes, VARIANTS[TASK], "auto", str(path))
    state = {name: tensor.float() for name, tensor in initialised(read_tensors(path), new)}
    # The layers for CLIP have no effect without an image: a model without them computes the same.
    model = Dit(replace(CONFIG, in_dim=state["patch_embedding.weight"].shape[1]))
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    settings = DitSettings(minutes=minutes, rate=1e-3, batch=32)
    trained = train_dit(folder, make_samples(folder, clips), settings, Trail(folder / "losses.jsonl"), start=model)
    save_dit(folder, state | trained.state_dict(), in_dim=model.config.in_dim)


def make_samples(folder: Path, clips: int) -> Samples:
    """Return latents of clips and of their outlines, and the captions."""
    scenes, kept = training_scenes(), folder / f"latents_{clips}.pt"
    if not kept.is_file():
        vae = load_vae(MODEL / VAE)
        drawn = [(scene, clips * number + index) for number, scene in enumerate(scenes) for index in range(clips)]
        both = (_encode(vae, [make(scene, seed) for scene, seed in drawn]) for make in (draw, draw_outline))
        torch.save(tuple(both), kept)
    latents, controls = torch.load(kept, weights_only=True)
    encoder = load_text_encoder(MODEL / T5)
    context, lengths = pad_captions([encoder([text])[0] for text in [*(scene.caption for scene in scenes), ""]])
    return Samples(latents, torch.arange(len(scenes)).repeat_interleave(clips), context, lengths, controls)


def share(folder: Path, scenes: Sequence[Scene], way: str) -> float:
    """Return the share of the scenes whose video, made with or without its outline, follows the outline."""
    lines = []
    for index, scene in enumerate(scenes):
        outline = folder / "outlines" / f"{index:03d}.mp4"
        write_video(outline, draw_outline(scene, FIRST_SEED + index), fps=FPS, codec="lossless")
        lines.append(f"{scene.caption} --d {index}" + f" --cn {outline}" * (way == "with"))
    prompts = folder / f"prompts_{way}.txt"
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = [sys.executable, "wan_generate_video.py", "--task", TASK, "--dit", str(folder / DIT)]
    words += ["--vae", str(MODEL / VAE), "--t5", str(MODEL / T5), "--from_file", str(prompts), *SAMPLING]
    subprocess.run([*words, "--save_path", f"{folder}/{way}/{{index}}.mp4"], cwd=ROOT, env=os.environ, check=True)
    videos = [read(folder / way / f"{index:03d}.mp4") for index in range(len(scenes))]
    drawn = [draw(scene, FIRST_SEED + index) for index, scene in enumerate(scenes)]
    return float(np.mean([follows(video, clip) for video, clip in zip(videos, drawn, strict=True)]))


def _encode(vae, clips: Sequence[NDArray[np.uint8]]) -> Tensor:  # type: ignore[no-untyped-def]
    pixels = [torch.from_numpy(clip).float().permute(3, 0, 1, 2) / 127.5 - 1 for clip in clips]
    with torch.no_grad():
        return torch.cat([vae.encode(torch.stack(pixels[start : start + 16])) for start in range(0, len(pixels), 16)])


if __name__ == "__main__":
    sys.exit(main())
