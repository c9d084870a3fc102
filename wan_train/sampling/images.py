"""First-frame, last-frame and control images."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from dataset.batching.buckets import resize_to_bucket
from dataset.reading.stills import image_size, read_image
from wan_train.errors import InputError
from wan_train.models.one_frame import OneFrame
from wan_train.models.variants import Variant


def check_images(variant: Variant, first: str | None, last: str | None) -> None:
    """Raise InputError for a missing image, one that the task does not take, or one that cannot be read."""
    if variant.images is None:
        if flag := "--image_path (--i)" * bool(first) or "--end_image_path (--ei)" * bool(last):
            made_from = "its VACE inputs" if variant.control else "text alone"
            raise InputError(
                f"{flag}: --task {variant.name} generates from {made_from}: use an i2v task, or leave it out"
            )
        return
    if last and (variant.is_fused or variant.control):
        raise InputError(f"--end_image_path (--ei): --task {variant.name} takes only a first-frame image: leave it out")
    if not first and (variant.is_fused or variant.images.optional):
        return
    if not first:
        raise InputError(
            f"--task {variant.name} requires a first-frame image: give --image_path (--i in a prompt line)"
        )
    if variant.images.last and not last:
        raise InputError(
            f"--task {variant.name} requires a last-frame image: give --end_image_path (--ei in a prompt line)"
        )
    for flag, path in (("--image_path", first), ("--end_image_path", last)):
        if path:
            check_image(flag, path)


def check_controls(variant: Variant, one_frame: OneFrame, images: Sequence[str]) -> None:
    """Raise InputError for control images that do not fit one-frame inference."""
    if variant.images is None or not variant.images.clip or variant.control:
        raise InputError(
            f"--one_frame_inference: --task {variant.name} does not support it: use a Wan2.1 i2v or flf2v task"
        )
    if variant.images.last and len(one_frame.controls) != 2:
        raise InputError(
            f"--one_frame_inference {one_frame}: --task {variant.name} takes two images: give two control indices"
        )
    if len(images) != len(one_frame.controls):
        raise InputError(
            f"--one_frame_inference {one_frame} needs {len(one_frame.controls)} control images, got {len(images)}: give"
            " one --control_image_path per control index (--ci in a prompt line)"
        )
    for path in images:
        check_image("--control_image_path", path)


def size_like(image: str, size: tuple[int, int], variant: Variant) -> tuple[int, int]:
    """Return (width, height) with an image's aspect ratio at about the area of `size`, never above it.

    Both are multiples of the task's size step. The rule is that of the official image2video: the sides of the exact
    area, each rounded down, here in integer arithmetic. For models that fuse the first frame it is the official rule of
    the 5B: round one side down, make the other as long as the area allows, and choose of the two options the one closer
    to the image's aspect ratio.
    """
    (width, height), area, step = image_size(Path(image)), size[0] * size[1], variant.space.size_step

    def floored(side: int, other: int) -> int:
        return max(1, math.isqrt(area * side // (other * step**2))) * step

    across, down = floored(width, height), floored(height, width)
    if not variant.is_fused:
        return across, down
    ways = [(across, max(step, area // across // step * step)), (max(step, area // down // step * step), down)]
    wanted = width / height
    return min(ways, key=lambda way: max(way[0] / way[1] / wanted, wanted * way[1] / way[0]))


def load_images(paths: Sequence[str], size: tuple[int, int]) -> list[Tensor]:
    """Return pixels (3, H, W) in [-1, 1] of images, scaled to cover `size` (width, height) and centre-cropped, as
    clips are in caching."""
    return [to_image(resize_to_bucket(read_image(Path(path)), size)) for path in paths]


def to_image(rgb: NDArray[np.uint8]) -> Tensor:
    """Convert (H, W, 3) uint8 to pixels (3, H, W) in [-1, 1]."""
    return rearrange(torch.from_numpy(rgb.copy()), "h w c -> c h w").float().div_(127.5).sub_(1.0)


def check_image(flag: str, path: str) -> None:
    """Raise InputError, naming the option, for an image that is missing or cannot be read."""
    if not Path(path).exists():
        raise InputError(f"{flag} {path}: no such file")
    try:
        read_image(Path(path))
    except InputError as problem:
        raise InputError(f"{flag} {problem}") from None
