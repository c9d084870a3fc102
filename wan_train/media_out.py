"""Writing videos and pictures."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from wan_train.storage import replacing


def to_frames(pixels: Tensor) -> np.ndarray:
    """Pixels (3, F, H, W) in [-1, 1] to frames (F, H, W, 3) in 0..255, rounded to the nearest."""
    scaled = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(scaled, "C F H W -> F H W C").cpu().numpy()


def write_video(path: str | os.PathLike[str], frames: np.ndarray, *, fps: int) -> None:
    """Write frames (F, H, W, 3) uint8 as H.264 mp4, yuv420p; H and W must be even."""
    with replacing(Path(path)) as temporary, av.open(str(temporary), mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Without a lookahead of its own thread the same frames always give the same file.
        stream.options = {"crf": "16", "x264-params": "sync-lookahead=0"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


def write_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write one frame (H, W, 3) uint8 as PNG."""
    with replacing(Path(path)) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def write_images(folder: str | os.PathLike[str], frames: np.ndarray) -> None:
    """Write frames as FOLDER/NAME_000.png and so on, NAME being the folder's own."""
    target = Path(folder)
    for index, image in enumerate(frames):
        write_image(target / f"{target.name}_{index:03d}.png", image)
