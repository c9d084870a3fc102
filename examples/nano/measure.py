"""Measure the small model on scenes not seen in its training.

    python examples/nano/measure.py [--folder examples/nano] [--captions 100] [--steps 20] [--guidance 2] [OPTION ...]

Prints one line of JSON: PSNR of the VAE on held-out clips; of the clips generated for held-out captions the share that
shows exactly one whole shape, that has the colour and the direction of the caption, and that has everything right.
Further options are the generator's: --lora_weight FILE, --fp8 --fp8_scaled, --int8_base, --blocks_to_swap 3.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from examples.nano.judge import Verdict, judge, psnr
from examples.nano.names import DIT, T5, VAE
from examples.nano.world import FRAMES, SIZE, Scene, draw, held_out_scenes
from generate.models import Models, VideoInputs
from generate.preflight import weighted_loras
from generate.settings import GenerateSettings
from wan_train.cli import parse
from wan_train.media_out import to_frames
from wan_train.models.vae.vae import WanVAE, load_vae
from wan_train.sampling.request import SampleRequest

CPU = torch.device("cpu")


def vae_psnr(vae: WanVAE, count: int = 48, seed: int = 5_000_000) -> float:
    """Return the mean PSNR in dB of held-out clips through the VAE."""
    scenes = held_out_scenes()
    values = []
    for index in range(count):
        clip = draw(scenes[index % len(scenes)], seed + index)
        pixels = torch.from_numpy(clip).float().permute(3, 0, 1, 2)[None] / 127.5 - 1
        values.append(psnr(to_frames(vae.decode(vae.encode(pixels))[0]), clip))
    return float(np.mean(values))


def open_models(folder: Path, options: Sequence[str] = ()) -> Models:
    """Return the generator's models from the files of a folder, with further options of the generator."""
    files = [f"--dit={folder / DIT}", f"--vae={folder / VAE}", f"--t5={folder / T5}"]
    settings = parse(GenerateSettings, ["--task=t2v-1.3B", *files, *options])
    return Models(settings, {None: weighted_loras(settings.lora)}, CPU)


def generate_clips(
    models: Models, captions: Sequence[str], *, steps: int = 20, guidance: float = 2.0, first_seed: int = 0
) -> list[np.ndarray]:
    """Return the generated clip (17, 32, 32, 3) of each caption; seeds are consecutive."""
    requests = [
        SampleRequest(caption, "", SIZE, SIZE, FRAMES, steps, guidance, 3.0, seed=first_seed + index)
        for index, caption in enumerate(captions)
    ]
    conditions = models.encode([*captions, ""])
    runs = [models.start(request, conditions, VideoInputs()) for request in requests]
    with models.dit() as dit:
        for run in runs:
            run.advance(dit.model)
    latents = [run.latents for run in runs]
    with models.vae() as vae:
        return [np.stack(list(models.decode(vae, each))) for each in latents]


def shares(verdicts: Sequence[Verdict], scenes: Sequence[Scene]) -> dict[str, float]:
    """Return the shares of clips that show one whole shape, the scene's colour, its direction, and all of these."""
    pairs = list(zip(verdicts, scenes, strict=True))
    return {
        "whole": float(np.mean([verdict.whole for verdict, _ in pairs])),
        "colour": float(np.mean([verdict.whole and verdict.colour == scene.colour for verdict, scene in pairs])),
        "direction": float(np.mean([verdict.whole and verdict.motion == scene.motion for verdict, scene in pairs])),
        "all": float(np.mean([verdict.fits(scene) for verdict, scene in pairs])),
    }


def choose_held_out(count: int) -> list[Scene]:
    """Return shuffled held-out scenes, repeated if there are not enough."""
    scenes = held_out_scenes()
    order = np.random.Generator(np.random.PCG64(7)).permutation(len(scenes))
    return [scenes[order[index % len(scenes)]] for index in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    given, options = parser.parse_known_args()
    scenes = choose_held_out(given.captions)
    models = open_models(given.folder, options)
    captions = [scene.caption for scene in scenes]
    verdicts = [judge(clip) for clip in generate_clips(models, captions, steps=given.steps, guidance=given.guidance)]
    about = {"options": options, "captions": len(scenes), "steps": given.steps, "guidance": given.guidance}
    quality = {"vae_psnr": round(vae_psnr(load_vae(given.folder / VAE)), 2)}
    print(json.dumps(about | quality | shares(verdicts, scenes)))


if __name__ == "__main__":
    main()
