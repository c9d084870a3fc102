"""Videos whose frames tell their own number, and TOML files over folders of them."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

BITS = 8


def draw_frame(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A picture of 8 vertical stripes: the bits of `number`, white for 1."""
    bits = [number >> bit & 1 for bit in range(BITS)]
    row = np.repeat(np.array(bits, np.uint8) * 255, -(-width // BITS))[:width]
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def read_number(picture: np.ndarray) -> int:
    """The number that `draw_frame` put there, after compression and scaling without cropping."""
    width = picture.shape[1]
    centres = [int((bit + 0.5) * width / BITS) for bit in range(BITS)]
    return sum((picture[:, x].mean() > 127) << bit for bit, x in enumerate(centres))


def draw_noise(number: int, width: int, height: int) -> np.ndarray:
    """A picture that compresses badly, as real ones do."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def draw_video(
    path: Path,
    num_frames: int,
    *,
    size=(64, 48),
    fps=16,
    codec="libx264",
    options=None,
    draw=draw_frame,
    pix_fmt="yuv420p",
    times=None,
    turned=None,
) -> Path:
    """`times` are milliseconds, in place of `fps`; `turned` are the degrees to the left by which players turn it."""
    rate = Fraction(fps) if times is None else Fraction(1000)
    # The index goes to the front, so that a file that is cut off can still be opened.
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        if turned is not None:
            stream.set_display_rotation(turned)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw(number, *size), "rgb24")
            frame.pts, frame.time_base = number if times is None else times[number], 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def draw_image(path: Path, size=(64, 48), mode="RGB") -> Path:
    Image.new(mode, size, 200 if mode in ("L", "P") else (200, 100, 50, 128)[: len(mode)]).save(path)
    return path


def write_toml(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def make_clips(folder: Path, lengths: dict[str, int], **drawn) -> Path:
    """A folder with a captioned video of so many frames for each name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, length in lengths.items():
        draw_video(folder / f"{name}.mp4", length, **drawn)
        (folder / f"{name}.txt").write_text(f"caption of {name}\n")
    return folder


def cut_video(whole: Path, cut: Path, seconds: Fraction) -> Path:
    """A copy without re-encoding whose edit list leaves out the first seconds."""
    with av.open(str(whole)) as source, av.open(str(cut), "w", options={"avoid_negative_ts": "disabled"}) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                shift = int(seconds / stream.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                target.mux(packet)
    return cut
