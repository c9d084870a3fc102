"""Convert decoded Pillow images to 8-bit sRGB: scale high bit depths, convert colour profiles, compose transparency."""

import functools
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from dataset.reading.info import ALPHA, GREY, PROFILE, Colour
from wan_train.errors import InputError
from wan_train.log import get_logger

logger = get_logger(__name__)

_GREY_MODES = ("L", "LA", "La", "1")
# Pixel mode for profiles of each colour space, by ICC signature.
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
_SAME = 2  # 8-bit levels by which a profile may differ from sRGB (rounding) and still be treated as sRGB


def to_rgb(image: Image.Image, path: Path, background: Colour | None) -> NDArray[np.uint8]:
    """Return an image as 8-bit sRGB (H, W, 3), composed on `background` where it is transparent.

    With `background` None, return its alpha in all three channels; 255 if it has none. An unusable colour profile is
    ignored with a warning. Raises InputError for values out of range.
    """
    if background is None:
        return np.repeat(_alpha(image)[..., None], 3, axis=2)
    profile = image.info.get("icc_profile")
    shallow = _to_eight_bits(image, path)
    rgb = np.asarray(_to_srgb(shallow, profile, path))
    return compose(rgb, _alpha(shallow), background) if _is_transparent(image) else rgb


def compose(rgb: NDArray[np.uint8], alpha: NDArray[np.uint8], background: Colour) -> NDArray[np.uint8]:
    """Return an image (H, W, 3) composed on a background by its straight alpha (H, W)."""
    weight = alpha[..., None].astype(np.uint16)
    mixed = rgb * weight + np.array(background, np.uint16) * (255 - weight)
    return ((mixed + 127) // 255).astype(np.uint8)


def describe_reading(image: Image.Image, path: Path, *, alone: bool) -> tuple[str, ...]:
    """Return the conversions that `to_rgb` applies to an opened image, as in `MediaInfo.reading`.

    Only greyscale images of more than 8 bits are decoded, and those with alpha if the image is `alone`: a fully opaque
    alpha has no effect, but one frame does not tell this for the frames after it. Raises InputError as `to_rgb` does.
    """
    words = []
    deep = image.mode[0] in "IF"
    if deep:
        _to_eight_bits(image, path)
        words.append(f"{GREY} {'float' if image.mode == 'F' else '16-bit'}")
    profile = image.info.get("icc_profile")
    if profile and (found := _profile(profile, "L" if deep else _base_mode(image), path)):
        words.append(f"{PROFILE} {found}")
    if _is_transparent(image) and not (alone and _alpha(image).min() == 255):
        words.append(ALPHA)
    return tuple(words)


def _is_transparent(image: Image.Image) -> bool:
    return image.mode[0] not in "IF" and image.has_transparency_data


def _alpha(image: Image.Image) -> NDArray[np.uint8]:
    if not _is_transparent(image):
        return np.full((image.height, image.width), 255, np.uint8)
    return np.asarray(image.convert("RGBA").getchannel("A"))


def _to_eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Return 16-bit, 32-bit and float greyscale images as 8-bit ones; others unchanged.

    Integers are 16-bit and are truncated to the upper byte, as Pillow does with 16-bit RGB; floats range from 0 (black)
    to 1.
    """
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image)
    top = 1.0 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # also false for NaN
        raise InputError(
            f"{path} has grey values from {values.min():g} to {values.max():g}, outside 0 to {top:g}: save it with 8"
            " or 16 bits"
        )
    grey = np.round(values * 255) if image.mode == "F" else values.astype(np.uint16) >> 8
    return Image.fromarray(grey.astype(np.uint8))


def _base_mode(image: Image.Image) -> str:
    """Return the mode of an image's colours without alpha and palette."""
    return "L" if image.mode in _GREY_MODES else image.mode if image.mode in ("CMYK", "LAB") else "RGB"


def _to_srgb(image: Image.Image, profile: bytes | None, path: Path) -> Image.Image:
    base = image.convert(_base_mode(image))
    if not profile or not _profile(profile, base.mode, path):
        return base.convert("RGB")
    transform, mode = _transform(profile)
    converted = ImageCms.applyTransform(base.convert(mode), transform)
    assert converted is not None
    return converted


def _profile(profile: bytes, mode: str, path: Path) -> str:
    """Return the name of a colour profile if converting from it to sRGB changes pixels of this mode, else ""."""
    try:
        name, its_mode = _examine(profile)
    except (ImageCms.PyCMSError, OSError, KeyError):
        _warn_ignored(path, "cannot be read")
        return ""
    # Grey pixels may have an RGB profile: they are RGB with equal channels.
    if mode != its_mode and not (mode == "L" and its_mode == "RGB"):
        _warn_ignored(path, f"is for {its_mode} pixels")
        return ""
    return name


@functools.lru_cache(maxsize=64)
def _examine(profile: bytes) -> tuple[str, str]:
    """Return a profile's name ("" if it is sRGB) and the mode of the pixels that it applies to."""
    transform, mode = _transform(profile)
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    if mode in ("RGB", "L"):
        cube = np.stack(np.meshgrid(*[steps] * (3 if mode == "RGB" else 1), indexing="ij"), axis=-1)
        colours = Image.fromarray(cube.reshape(1, -1, 3) if mode == "RGB" else cube.reshape(1, -1))
        converted = ImageCms.applyTransform(colours, transform)
        assert converted is not None
        difference = np.asarray(converted).astype(int) - np.asarray(colours.convert("RGB"))
        if np.abs(difference).max() <= _SAME:
            return "", mode
    described = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    return " ".join(described.split()) or "unnamed", mode


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes) -> tuple[ImageCms.ImageCmsTransform, str]:
    """Return the conversion to sRGB and its input mode; colours outside sRGB are clipped."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = _PROFILE_MODES[source.profile.xcolor_space.strip()]
    target = ImageCms.createProfile("sRGB")
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    return ImageCms.buildTransform(source, target, mode, "RGB", intent, flags), mode


@functools.cache
def _warn_ignored(path: Path, reason: str) -> None:
    logger.warning("%s: its color profile %s and is ignored", path, reason)
