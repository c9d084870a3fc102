"""Show what would be cached instead of caching it: as images, as videos, or in the terminal."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from cache_tools.extras import load_controls
from cache_tools.settings import CONSOLE_COLOURS, InspectSettings
from dataset.batching.buckets import describe_size
from dataset.caching.cache import latents_path
from dataset.reading.media import load_clips
from dataset.sources import ClipPlan
from wan_train.media_out import write_image, write_video

Pixels = NDArray[np.uint8]

_SHEET_WIDTH = 2048
_CELL_ASPECT = 2  # a character is about twice as high as wide, and shows two pixels, one above the other


def show_clips(plans: Sequence[ClipPlan], settings: InspectSettings) -> None:
    """Show the clips of each dataset, with captions and beside their controls, in the format set by `debug_mode`.

    "image" writes a contact sheet of each clip's frames and "video" an mp4, below `debug_dir`; "console" prints first
    frames.
    """
    for plan in plans:
        folder = Path(settings.debug_dir) / f"dataset_{plan.config.number}"
        for clip in plan.clips[: settings.console_num_images]:
            (images,) = load_clips([clip])
            if clip.item.control and not plan.config.one_frame:
                images = np.concatenate([images, *load_controls([clip])], axis=2)
            print(f"{clip.item.path} from frame {clip.start}: {describe_size(clip.size)}, {clip.num_frames} frames")
            print(f"  {clip.item.caption}")
            if settings.debug_mode == "console":
                print("\n".join(draw_blocks(images[0], settings.console_width, settings.console_back)))
            else:
                stem, fps = folder / latents_path(clip).stem, plan.config.space.fps
                print(f"  {_write(stem, images, settings.debug_mode, fps)}")


def draw_blocks(image: Pixels, width: int, back: str = "") -> Iterator[str]:
    """Yield terminal lines that show an image (H, W, 3), `width` characters wide, with two pixels per character.

    Colours are 24-bit escape sequences. `back`, one of `CONSOLE_COLOURS`, adds a border of that colour.
    """
    rim = f"\x1b[{40 + CONSOLE_COLOURS.index(back)}m  \x1b[0m" if back else ""
    inner = max(width - 4 * bool(back), 1)
    rows = max(round(image.shape[0] * inner / image.shape[1] / _CELL_ASPECT), 1)
    small = np.asarray(Image.fromarray(image).resize((inner, 2 * rows), Image.Resampling.BOX))
    edge = rim * (width // 2)
    if rim:
        yield edge
    for upper, lower in rearrange(small, "(row half) column colour -> row half column colour", half=2):
        cells = (f"\x1b[38;2;{_rgb(above)};48;2;{_rgb(below)}m▀" for above, below in zip(upper, lower, strict=True))
        yield f"{rim}{''.join(cells)}\x1b[0m{rim}"
    if rim:
        yield edge


def make_sheet(images: Pixels) -> Pixels:
    """Return a contact sheet of images (F, H, W, 3), scaled down if it would be wider than 2048."""
    columns = math.ceil(math.sqrt(len(images)))
    if columns > 1 and columns * images.shape[2] > _SHEET_WIDTH:
        width = _SHEET_WIDTH // columns
        size = (width, max(images.shape[1] * width // images.shape[2], 1))
        images = np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BOX)) for p in images])
    missing = -len(images) % columns
    filled = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)])
    return rearrange(filled, "(row column) h w colour -> (row h) (column w) colour", column=columns)


def _write(stem: Path, images: Pixels, mode: str, fps: int) -> Path:
    if mode == "video" and len(images) > 1:
        path = stem.with_name(f"{stem.name}.mp4")
        write_video(path, images, fps=fps)
    else:
        path = stem.with_name(f"{stem.name}.png")
        write_image(path, make_sheet(images))
    return path


def _rgb(colour: NDArray[np.uint8]) -> str:
    return ";".join(map(str, colour.tolist()))
