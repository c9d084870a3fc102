"""Image sizes: which bucket an image goes to, and how it is brought there. The same as musubi-tuner's.

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
    """Every size of about the area width x height whose sides are multiples of `step`, sorted.

    The shorter side goes from half the root of the area up to the root. Both sides are a step or more.
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
    """The bucket for an image of `size`, images and videos alike.

    Without `enable_bucket` it is `resolution`. With it, the bucket of the nearest width / height; the first in order
    where two are as near. `no_upscale` leaves an image whose area is not above that of `resolution` at its own size
    floored to `step`, which is 0 for a side below that.
    """
    if not enable_bucket:
        return resolution
    width, height = size
    if no_upscale and width * height <= resolution[0] * resolution[1]:
        return _floor(width, step), _floor(height, step)
    return min(bucket_sizes(*resolution, step), key=lambda bucket: abs(bucket[0] / bucket[1] - width / height))


def resize_to_bucket(rgb: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Scale an image until it covers `size`, then crop the middle: Lanczos up, area average down."""
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
    """A size in words that cannot be read the wrong way round."""
    return f"{size[0]} wide, {size[1]} high"


def _floor(side: int, step: int) -> int:
    return side - side % step
