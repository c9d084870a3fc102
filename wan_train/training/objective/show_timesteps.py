"""Show the distribution of training timesteps, `--show_timesteps`, as text or an image."""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from wan_train.flow.timesteps import NUM_TIMESTEPS
from wan_train.flow.weighting import importance
from wan_train.media_out import write_image
from wan_train.training.objective.loss import draw_levels
from wan_train.training.settings import TimestepSettings, TrainSettings

NUM_DRAWS = 100_000
NUM_BINS = 50
SIZE = (128, 128)  # the latents of 1024x1024 pixels
BAR = 60  # characters of the longest bar
MARGIN, WIDTH, HEIGHT = 40, 1000, 400  # pixels


def show_timesteps(settings: TrainSettings, size: tuple[int, int] = SIZE) -> str:
    """Return the text to print; `image` writes OUTPUT_DIR/timesteps.png first. `size` is the latents' (height, width).

    The levels are drawn by the training code, with --seed or 0.
    """
    t = draw_many(settings.timesteps, size, seed=settings.loop.seed or 0)
    if settings.timesteps.show_timesteps == "image":
        path = Path(settings.save.output_dir) / "timesteps.png"
        write_image(path, paint(t, settings.timesteps, size))
        return f"wrote {path}"
    return chart(t, settings.timesteps, size)


def draw_many(settings: TimestepSettings, size: tuple[int, int], *, seed: int) -> Tensor:
    """Draw NUM_DRAWS noise levels (N,), float32."""
    chance = random.Random(f"{seed} shown timesteps")
    numbers = [chance.random() for _ in range(NUM_DRAWS)]
    return draw_levels(numbers, size, settings)


def describe(settings: TimestepSettings, size: tuple[int, int]) -> str:
    """Describe the shown distribution in one line."""
    span = f"{settings.min_timestep} to {settings.max_timestep}"
    pixels = f"{8 * size[1]}x{8 * size[0]} pixels"
    return f"{NUM_DRAWS} noise levels, {settings.timestep_sampling}, {span}, for {pixels}"


def count(t: Tensor) -> Tensor:
    """Return the number of levels in each bin (NUM_BINS,); the last bin includes 1."""
    return torch.histc(t, NUM_BINS, 0, 1)


def chart(t: Tensor, settings: TimestepSettings, size: tuple[int, int]) -> str:
    """Return a line for each bin: its levels, its share of the draws, a bar, and the weight of the loss there unless it
    is 1."""
    counts, step = count(t), NUM_TIMESTEPS // NUM_BINS
    weights = importance(settings.weighting_scheme, (torch.arange(NUM_BINS) + 0.5) / NUM_BINS)
    lines = [describe(settings, size)]
    for place, number in enumerate(counts.tolist()):
        bar = "#" * round(BAR * number / float(counts.max()))
        line = f"{place * step:4d}-{(place + 1) * step:<4d} {100 * number / len(t):6.2f}% {bar}"
        lines.append(line.rstrip() if weights is None else f"{line:<{BAR + 18}} x {float(weights[place]):.3g}")
    return "\n".join(lines)


def paint(t: Tensor, settings: TimestepSettings, size: tuple[int, int]) -> np.ndarray:
    """Draw the histogram as an image (H, W, 3) uint8, levels 0 to 1000 from left to right."""
    counts = count(t)
    image = Image.new("RGB", (WIDTH + 2 * MARGIN, HEIGHT + 2 * MARGIN), "white")
    pen, floor, width = ImageDraw.Draw(image), MARGIN + HEIGHT, WIDTH // NUM_BINS
    for place, number in enumerate(counts.tolist()):
        left, top = MARGIN + place * width, floor - round(HEIGHT * number / float(counts.max()))
        if number:
            pen.rectangle((left, top, left + width - 2, floor), fill="steelblue")
    pen.line((MARGIN, floor, MARGIN + WIDTH, floor), fill="black")
    for level in range(0, NUM_TIMESTEPS + 1, 100):
        pen.text((MARGIN + level * WIDTH // NUM_TIMESTEPS, floor + 6), str(level), fill="black", anchor="ma")
    pen.text((MARGIN, MARGIN // 3), describe(settings, size), fill="black")
    return np.asarray(image)
