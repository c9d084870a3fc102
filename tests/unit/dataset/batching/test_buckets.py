import random

import cv2
import numpy as np
import pytest
from PIL import Image

from dataset.batching.buckets import bucket_sizes, choose_bucket, describe_size, resize_to_bucket


def choose(size, resolution, enable_bucket=True, no_upscale=False):
    return choose_bucket(size, resolution, enable_bucket=enable_bucket, no_upscale=no_upscale)


@pytest.mark.parametrize(
    ("resolution", "count", "size", "bucket"),
    [
        ((960, 544), 47, (1920, 1080), (960, 544)),
        ((960, 544), 47, (512, 512), (720, 720)),
        ((832, 480), 42, (512, 512), (624, 640)),
        ((256, 256), 17, (1280, 720), (336, 192)),
    ],
)
def test_published_vectors(resolution, count, size, bucket):
    assert len(bucket_sizes(*resolution)) == count
    assert choose(size, resolution) == bucket


def all_buckets(width, height):
    """Every pair of multiples of 16 that the rule admits, found by looking at all of them."""
    area = width * height
    root = int(area**0.5)
    found = set()
    for a in range(16, root + 16, 16):
        if a >= (root // 2) // 16 * 16:
            b = (area // a) // 16 * 16
            if b:
                found |= {(a, b), (b, a)}
    # The steps start at a multiple of 16, so that none is left out.
    return sorted(found)


def test_random_sizes_agree_with_a_search_of_every_bucket():
    chance = random.Random(0)
    for _ in range(10_000):
        resolution = chance.randrange(16, 2000), chance.randrange(16, 2000)
        size = chance.randrange(1, 5000), chance.randrange(1, 5000)
        buckets = all_buckets(*resolution)
        assert list(bucket_sizes(*resolution)) == buckets
        errors = [abs(w / h - size[0] / size[1]) for w, h in buckets]
        assert choose(size, resolution) == buckets[errors.index(min(errors))]


@pytest.mark.parametrize("size", [(1920, 1080), (100, 900)])
def test_without_buckets_every_image_goes_to_the_resolution(size):
    assert choose(size, (832, 480), enable_bucket=False) == (832, 480)
    assert choose(size, (832, 480), enable_bucket=False, no_upscale=True) == (832, 480)


def test_no_upscale_keeps_small_images_at_their_floored_size():
    assert choose((500, 333), (832, 480), no_upscale=True) == (496, 320)
    assert choose((390, 1024), (832, 480), no_upscale=True) == (384, 1024)  # the very same area
    assert choose((1920, 1080), (832, 480), no_upscale=True) == choose((1920, 1080), (832, 480))


def reference_resize(rgb, size):
    """The rule in whole: cover, then crop the middle."""
    (height, width), (to_width, to_height) = rgb.shape[:2], size
    scale = max(to_width / width, to_height / height)
    new = round(width * scale), round(height * scale)
    if scale > 1:
        scaled = np.asarray(Image.fromarray(rgb).resize(new, Image.LANCZOS))
    else:
        scaled = cv2.resize(rgb, new, interpolation=cv2.INTER_AREA)
    x, y = (new[0] - to_width) // 2, (new[1] - to_height) // 2
    return scaled[y : y + to_height, x : x + to_width]


def test_random_images_cover_their_bucket():
    chance = random.Random(1)
    noise = np.random.default_rng(1)
    for _ in range(200):
        size = chance.randrange(16, 300), chance.randrange(16, 300)
        resolution = 16 * chance.randrange(2, 10), 16 * chance.randrange(2, 10)
        rgb = noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        bucket = choose(size, resolution)
        resized = resize_to_bucket(rgb, bucket)
        assert resized.shape == (bucket[1], bucket[0], 3)
        assert np.array_equal(resized, reference_resize(rgb, bucket))


def test_halving_averages_and_the_crop_is_in_the_middle():
    rgb = np.zeros((32, 96, 3), np.uint8)
    rgb[:, 40:56] = 200  # the middle 16 columns of 96
    rgb[::2] //= 2
    resized = resize_to_bucket(rgb, (16, 16))
    assert (resized[:, 4:12] == 150).all()
    assert (resized[:, :4] == 0).all() and (resized[:, 12:] == 0).all()


def test_a_image_of_the_right_size_is_unchanged():
    rgb = np.random.default_rng(2).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    assert np.array_equal(resize_to_bucket(rgb, (64, 48)), rgb)


def test_sizes_are_told_in_words():
    assert describe_size((832, 480)) == "832 wide, 480 high"
