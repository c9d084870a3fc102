"""Judge by rules, from its pixels, what a clip of the small world shows; all claims are measured with it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from examples.nano.world import COLOURS, FRAMES, MOTIONS, NEW_COLOURS, RADIUS, Colour, Scene

PALETTE = COLOURS | NEW_COLOURS
_CONTRAST = 45.0  # minimum Euclidean RGB distance of a shape's pixels from the background
_AREAS = (0.5 * 1.8 * RADIUS**2, 1.5 * 4 * RADIUS**2)  # pixels, from half a triangle to one and a half squares
_SOLID = 0.8  # minimum share of its convex hull that a whole shape fills
_MOVED = 4.0  # pixels: a third of a moving shape's path
_NEAR = 3.0  # pixels: half a shape's radius


@dataclass(frozen=True)
class Verdict:
    """What a clip shows: whether exactly one whole shape is visible throughout, its colour, and its motion."""

    whole: bool
    colour: str
    motion: str

    def fits(self, scene: Scene) -> bool:
        """Return whether it matches the scene."""
        return self.whole and self.colour == scene.colour and self.motion == scene.motion


@dataclass(frozen=True)
class _Spot:
    x: float
    y: float
    colour: NDArray[np.float64]


def judge(frames: NDArray[np.uint8], palette: Mapping[str, Colour] = PALETTE) -> Verdict:
    """Return the verdict on a clip (F, 32, 32, 3)."""
    looked_at = [int(i) for i in np.linspace(0, len(frames) - 1, 5)]
    spots = [_find(frames[index]) for index in looked_at]
    found = [spot for spot in spots if spot is not None]
    whole = len(found) == len(looked_at)
    if not found:
        return Verdict(False, "", "")
    mean = np.mean([spot.colour for spot in found], axis=0)
    colour = min(palette, key=lambda name: float(np.linalg.norm(mean - palette[name])))
    return Verdict(whole, colour, _motion(found[-1].x - found[0].x, found[-1].y - found[0].y))


def centres(frames: NDArray[np.uint8]) -> list[tuple[float, float] | None]:
    """Return the centre of the one whole shape in each frame (F, 32, 32, 3), right and down in pixels; None without
    one."""
    spots = [_find(frame) for frame in frames]
    return [None if spot is None else (spot.x, spot.y) for spot in spots]


def follows(frames: NDArray[np.uint8], shown: NDArray[np.uint8]) -> bool:
    """Return whether a clip's shape follows another's: within 3 pixels of it in 3 of 4 frames."""
    pairs = zip(centres(frames), centres(shown), strict=True)
    near = [here is not None and there is not None and math.dist(here, there) <= _NEAR for here, there in pairs]
    return sum(near) >= 0.75 * len(near)


def _find(frame: NDArray[np.uint8]) -> _Spot | None:
    """Return the one whole shape of a frame, or None if there is none or more than one."""
    pixels = frame.astype(np.float64)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    mask = (np.linalg.norm(pixels - np.median(edge, axis=0), axis=-1) > _CONTRAST).astype(np.uint8)
    count, labels, stats, centres = cv2.connectedComponentsWithStats(mask, connectivity=8)
    spots = [label for label in range(1, count) if stats[label, cv2.CC_STAT_AREA] >= 6]
    if len(spots) != 1:
        return None
    (label,) = spots
    area = stats[label, cv2.CC_STAT_AREA]
    part = (labels == label).astype(np.uint8)
    outline, _ = cv2.findContours(part, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    hull = np.zeros_like(part)
    cv2.fillConvexPoly(hull, cv2.convexHull(outline[0]), 1)
    if not _AREAS[0] <= area <= _AREAS[1] or area < _SOLID * hull.sum():
        return None
    core = cv2.erode(part, np.ones((3, 3), np.uint8)).astype(bool)
    core = core if core.any() else part.astype(bool)
    return _Spot(centres[label][0], centres[label][1], np.median(pixels[core], axis=0))


def _motion(right: float, down: float) -> str:
    step = (0, 0)
    if max(abs(right), abs(down)) >= _MOVED:
        step = (int(np.sign(right)), 0) if abs(right) > abs(down) else (0, int(np.sign(down)))
    return next(name for name, way in MOTIONS.items() if way == step)


def psnr(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio of two clips in dB."""
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


assert FRAMES > 1
