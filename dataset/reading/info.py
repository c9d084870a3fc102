"""What a media file says of itself, and in words what reading it does to its pixels beyond decoding them.

The words go into recipes, so that a cache is stale where its file is read in another way than when it was made, and
into the plan.
"""

from collections.abc import Iterable
from dataclasses import dataclass

Colour = tuple[int, int, int]

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
# First words of `MediaInfo.reading`; what follows them is the detail.
PIXELS, HDR, PROFILE, ALPHA, GREY, TURNED = "pixels", "hdr", "profile", "alpha", "grey", "turned"


@dataclass(frozen=True)
class MediaInfo:
    """What a file says of itself: size in pixels as shown, frames that decode, frames per second (None: an image).

    `times` is there when asked for: the second at which each frame begins, from 0, and the one at which the last ends.
    `reading` is what is done to the pixels: "pixels 64:45" (scaled to square ones), "hdr PQ" (tone-mapped), "profile
    NAME" (converted to sRGB), "alpha" (composed on a background), "grey 16-bit" (scaled to 8 bits), "turned" (an image,
    by its EXIF data).
    `lost_frames` are stored, and cannot be decoded.
    """

    width: int
    height: int
    num_frames: int
    fps: float | None
    times: tuple[float, ...] = ()
    reading: tuple[str, ...] = ()
    lost_frames: int = 0


def describe_colour(colour: Colour) -> str:
    """A colour as HTML writes it."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def recipe_words(reading: Iterable[str], background: Colour | None, *, is_video: bool) -> str:
    """`MediaInfo.reading` as a recipe holds it: with the background on which transparency is composed, None where the
    alpha itself is read. Images of an image dataset have always been turned, so that there it makes no difference."""
    ground = "read" if background is None else describe_colour(background)
    kept = [word for word in reading if word != TURNED or is_video]
    return ", ".join(f"{word} {ground}" if word == ALPHA else word for word in kept)


def plan_words(word: str, background: Colour) -> str:
    """One of `MediaInfo.reading` in words for people; nothing for what needs no mention."""
    kind, _, detail = word.partition(" ")
    return {
        PIXELS: f"non-square pixels ({detail}), scaled to the displayed width",
        HDR: f"HDR ({detail}), tone-mapped to SDR",
        PROFILE: f"another colour profile ({detail}), converted to sRGB",
        ALPHA: f"transparency, composed on alpha_background {describe_colour(background)}",
        GREY: f"{detail} grey, scaled to 8 bits",
        TURNED: "",
    }[kind]
