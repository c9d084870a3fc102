"""The world of the small model: clips of one shape that moves or stands still, on a plain background, with captions.

Everything is computed from a seed in float64, without library functions that differ between machines, so that the
frames of a seed are the same everywhere.

    python examples/nano/world.py FOLDER [--count 24] [--seed 0] [--colour red ...]     writes clips and captions
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SIZE, FRAMES, FPS = 32, 17, 16
RADIUS, TRAVEL = 6.0, 12.0  # pixels: half the width of a shape, and the path of a moving one in a clip
OUTLINE = 1.0  # pixels: half the width of an outline

Colour = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle")
COLOURS: dict[str, Colour] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 210, 45),
    "white": (245, 245, 245),
    "purple": (150, 50, 190),
}
# Words that occur in no caption of the pretraining; the demo teaches the first.
NEW_COLOURS: dict[str, Colour] = {"cyan": (30, 210, 215), "orange": (240, 130, 30)}
BACKGROUNDS: dict[str, Colour] = {
    "grey": (128, 128, 128),
    "black": (16, 16, 16),
    "brown": (110, 72, 48),
    "navy": (24, 32, 84),
}
MOTIONS: dict[str, tuple[int, int]] = {  # (right, down)
    "moves to the left": (-1, 0),
    "moves to the right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
    "stays still": (0, 0),
}
UNUSED_WORDS = (
    *("cyan", "orange", "pink", "star", "heart", "ring", "cross", "diamond"),
    *("jumps", "spins", "grows", "shrinks", "zorp", "blick", "fep", "dax"),
)


@dataclass(frozen=True)
class Scene:
    """The contents of a clip, in words."""

    colour: str
    shape: str
    motion: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} {self.motion} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """Whether the combination of colour, shape and motion is not in the pretraining: one in six of each."""
        numbers = (list(COLOURS).index(self.colour), SHAPES.index(self.shape), list(MOTIONS).index(self.motion))
        return (numbers[0] + 2 * numbers[1] + numbers[2]) % 6 == 0


def all_scenes(colours: Sequence[str] = tuple(COLOURS)) -> list[Scene]:
    """Return all combinations."""
    return [Scene(*parts) for parts in itertools.product(colours, SHAPES, MOTIONS, BACKGROUNDS)]


def training_scenes() -> list[Scene]:
    """Return the scenes used in pretraining."""
    return [scene for scene in all_scenes() if not scene.held_out]


def held_out_scenes() -> list[Scene]:
    """Return the scenes not used in pretraining."""
    return [scene for scene in all_scenes() if scene.held_out]


def draw(scene: Scene, seed: int) -> NDArray[np.uint8]:
    """Return the clip (17, 32, 32, 3) of a scene; the seed sets the position of the shape."""
    colour = (COLOURS | NEW_COLOURS)[scene.colour]
    return draw_clip(scene.shape, MOTIONS[scene.motion], colour, BACKGROUNDS[scene.background], seed)


def draw_clip(shape: str, motion: tuple[int, int], colour: Colour, background: Colour, seed: int) -> NDArray[np.uint8]:
    """Return the clip (17, 32, 32, 3) of a shape of any colour on any background, always fully inside the image."""
    frames = np.empty((FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    for index, distance in enumerate(_distances(shape, motion, seed)):
        inside = np.clip(0.5 - distance, 0, 1)[..., None]
        frames[index] = (np.array(background) * (1 - inside) + np.array(colour) * inside + 0.5).astype(np.uint8)
    return frames


def draw_outline(scene: Scene, seed: int) -> NDArray[np.uint8]:
    """Return the outline (17, 32, 32, 3) of the shape drawn by `draw` for this scene and seed, white on black."""
    distances = np.stack(_distances(scene.shape, MOTIONS[scene.motion], seed))
    line = np.clip(OUTLINE - abs(distances) + 0.5, 0, 1)
    return np.repeat((255 * line + 0.5).astype(np.uint8)[..., None], 3, axis=-1)


def path_of(scene: Scene, seed: int) -> NDArray[np.float64]:
    """Return the position of that shape in every frame: (17, 2), right and down, in pixels."""
    return _path(MOTIONS[scene.motion], seed)


def _path(motion: tuple[int, int], seed: int) -> NDArray[np.float64]:
    place = np.random.Generator(np.random.PCG64(seed)).random(2)
    ends = [(RADIUS + 1 + max(0, -step) * TRAVEL, SIZE - RADIUS - 1 - max(0, step) * TRAVEL) for step in motion]
    start = [low + (high - low) * part for (low, high), part in zip(ends, place, strict=True)]
    ways = [TRAVEL * index / (FRAMES - 1) for index in range(FRAMES)]
    return np.array([[start[0] + motion[0] * way, start[1] + motion[1] * way] for way in ways])


def _distances(shape: str, motion: tuple[int, int], seed: int) -> list[NDArray[np.float64]]:
    """Return `_distance` of each pixel to the shape, frame by frame."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    return [_distance(shape, columns - x, rows - y) for x, y in _path(motion, seed)]


def _distance(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the approximate distance of each point from the shape, in pixels; negative inside."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - RADIUS
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.9 * RADIUS
    # A triangle that stands on its base: two slanted sides of slope 2 and the base.
    return np.maximum((2 * abs(x) - y - RADIUS) / 5**0.5, y - RADIUS)


def write_clips(folder: Path, scenes: Sequence[Scene], *, first_seed: int = 0) -> list[Path]:
    """Write an mp4 of each scene, with its caption beside it; return their paths."""
    from wan_train.media_out import write_video

    paths = []
    for index, scene in enumerate(scenes):
        path = folder / f"{index:03d}_{scene.colour}_{scene.shape}.mp4"
        write_video(path, draw(scene, first_seed + index), fps=FPS, quality=6)
        path.with_suffix(".txt").write_text(scene.caption + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def choose_scenes(count: int, seed: int, colours: Sequence[str] = tuple(COLOURS)) -> list[Scene]:
    """Return randomly drawn scenes, without repeats if there are enough."""
    scenes = all_scenes(colours)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(scenes))
    return [scenes[order[index % len(scenes)]] for index in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--colour", nargs="+", default=list(COLOURS), choices=[*COLOURS, *NEW_COLOURS])
    given = parser.parse_args()
    paths = write_clips(given.folder, choose_scenes(given.count, given.seed, given.colour), first_seed=given.seed)
    print(f"wrote {len(paths)} clips to {given.folder}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
