"""Image sizes: which bucket an image belongs to, and how it is resized to it. The same as musubi-tuner's.

A size is (width, height) in pixels; an image is (height, width, 3) uint8.
"""

import functools
import math

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wan_train.models.variants import SIZE_STEP

Size = tuple[int, int]


@functools.lru_cache
def bucket_sizes(width: int, height: int, step: int = SIZE_STEP) -> tuple[Size, ...]:
    """Return all sizes of about the area width x height whose sides are multiples of `step`, sorted.

    The shorter side ranges from half the square root of the area to the square root. Both sides are at least `step`.
    """
    area = width * height
    root = math.isqrt(area)
    # Areas below 32 x 32 would start at 0.
    first = max(_floor(root // 2, step), step)
    pairs = ((side, _floor(area // side, step)) for side in range(first, root + step, step))
    return tuple(sorted({size for a, b in pairs if b for size in ((a, b), (b, a))}))


def choose_bucket(
    size: Size, resolution: Size, *, enable_bucket: bool, no_upscale: bool, step: int = SIZE_STEP
) -> Size:
    """Return the bucket for an image or video of `size`.

    Without `enable_bucket` it is `resolution`. With it, it is the bucket with the nearest aspect ratio; the first one
    if two are equally near. `no_upscale` keeps an image whose area is at most that of `resolution` at its own size,
    rounded down to `step`, which is 0 for a side below `step`.
    """
    if not enable_bucket:
        return resolution
    width, height = size
    if no_upscale and width * height <= resolution[0] * resolution[1]:
        return _floor(width, step), _floor(height, step)
    return min(bucket_sizes(*resolution, step), key=lambda bucket: abs(bucket[0] / bucket[1] - width / height))


def resize_to_bucket(rgb: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Scale an image to cover `size` and crop the centre: Lanczos for upscaling, area averaging for downscaling."""
    height, width = rgb.shape[:2]
    scale = max(size[0] / width, size[1] / height)
    covering = (int(width * scale + 0.5), int(height * scale + 0.5))
    if scale > 1:
        scaled = np.asarray(Image.fromarray(rgb).resize(covering, Image.Resampling.LANCZOS))
    else:
        scaled = np.asarray(cv2.resize(rgb, covering, interpolation=cv2.INTER_AREA))
    left, top = (covering[0] - size[0]) // 2, (covering[1] - size[1]) // 2
    return np.ascontiguousarray(scaled[top : top + size[1], left : left + size[0]])


def describe_size(size: Size) -> str:
    """Return a size in words that cannot be misread as height x width."""
    return f"{size[0]} wide, {size[1]} high"


def _floor(side: int, step: int) -> int:
    return side - side % step
