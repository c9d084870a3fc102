"""Media information of a file, and the names of the pixel processing applied beyond decoding.

The names are stored in recipes, so that a cache is stale if its file is now processed differently, and shown in the
plan.
"""

from collections.abc import Iterable
from dataclasses import dataclass

Colour = tuple[int, int, int]

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
# First words of the entries of `MediaInfo.reading`; details follow.
PIXELS, HDR, PROFILE, ALPHA, GREY, TURNED = "pixels", "hdr", "profile", "alpha", "grey", "turned"


@dataclass(frozen=True)
class MediaInfo:
    """Displayed size in pixels, number of decodable frames, and frames per second (None: an image).

    `times` is set on request: the start time of each frame in seconds, from 0, followed by the end time of the last.

    `reading` lists the pixel processing: "pixels 64:45" (scaled to square pixels), "hdr PQ" (tone-mapped), "profile
    NAME" (converted to sRGB), "alpha" (composed on a background), "grey 16-bit" (scaled to 8 bits), "turned" (an image
    rotated by its EXIF data).

    `lost_frames` are stored but cannot be decoded.
    """

    width: int
    height: int
    num_frames: int
    fps: float | None
    times: tuple[float, ...] = ()
    reading: tuple[str, ...] = ()
    lost_frames: int = 0


def describe_colour(colour: Colour) -> str:
    """Return a colour in HTML notation."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def recipe_words(reading: Iterable[str], background: Colour | None, *, is_video: bool) -> str:
    """Return `MediaInfo.reading` as stored in a recipe, with the background for transparency (None: the alpha itself is
    read).

    Images of an image dataset have always been rotated by their EXIF data, so "turned" is left out for them.
    """
    ground = "read" if background is None else describe_colour(background)
    kept = [word for word in reading if word != TURNED or is_video]
    return ", ".join(f"{word} {ground}" if word == ALPHA else word for word in kept)


def plan_words(word: str, background: Colour) -> str:
    """Return a `MediaInfo.reading` entry as text for the plan; "" if it needs no mention."""
    kind, _, detail = word.partition(" ")
    return {
        PIXELS: f"non-square pixels ({detail}), scaled to the displayed width",
        HDR: f"HDR ({detail}), tone-mapped to SDR",
        PROFILE: f"colour profile {detail}, converted to sRGB",
        ALPHA: f"transparency, composed on alpha_background {describe_colour(background)}",
        GREY: f"{detail} grey, scaled to 8 bits",
        TURNED: "",
    }[kind]
