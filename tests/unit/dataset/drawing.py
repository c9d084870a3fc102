"""Videos whose frames tell their own number, and TOML files over folders of them."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

BITS = 8


def draw_frame(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """An image of 8 vertical stripes: the bits of `number`, white for 1."""
    bits = [number >> bit & 1 for bit in range(BITS)]
    row = np.repeat(np.array(bits, np.uint8) * 255, -(-width // BITS))[:width]
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def read_number(image: np.ndarray) -> int:
    """The number that `draw_frame` put there, after compression and scaling without cropping."""
    width = image.shape[1]
    centres = [int((bit + 0.5) * width / BITS) for bit in range(BITS)]
    return sum((image[:, x].mean() > 127) << bit for bit, x in enumerate(centres))


def draw_noise(number: int, width: int, height: int) -> np.ndarray:
    """An image that compresses badly, as real ones do."""
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
    aspect=None,
    transfer=None,
) -> Path:
    """`times` are milliseconds, in place of `fps`; `turned` are the degrees to the left by which players turn it,
    `aspect` is the width of a pixel to its height, `transfer` the number of a transfer characteristic."""
    rate = Fraction(fps) if times is None else Fraction(1000)
    # The index goes to the front, so that a file that is cut off can still be opened.
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if transfer is not None:
            stream.codec_context.color_trc = transfer
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


def make_stills(folder: Path, count: int, *, num_square: int, caption: str) -> Path:
    """A folder of images with `caption`, formatted with its `number`: the first ones 32x32, the others 16x64."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        draw_image(folder / f"{number:02d}.png", (32, 32) if number < num_square else (16, 64))
        (folder / f"{number:02d}.txt").write_text(caption.format(number=number))
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


def cut_at_key(whole: Path, cut: Path) -> Path:
    """A copy without re-encoding that begins at the second key frame."""
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = source.streams.video[0]
        copy, keys, first = target.add_stream_from_template(stream), 0, None
        for packet in source.demux(stream):
            keys += packet.is_keyframe
            if keys < 2 or not packet.size:
                continue
            first = first if first is not None else packet.dts if packet.dts is not None else packet.pts
            packet.pts -= first
            packet.dts = None if packet.dts is None else packet.dts - first
            packet.stream = copy
            target.mux(packet)
    return cut


def make_profile(name: str, colorants: np.ndarray, gamma: float) -> bytes:
    """An ICC profile of a screen: the XYZ (rows red, green, blue, relative to D50) of its primaries, and its gamma."""

    def fixed(*values: float) -> bytes:
        return b"".join(round(value * 65536).to_bytes(4, "big", signed=True) for value in values)

    described = name.encode() + b"\0"
    text = b"desc" + bytes(4) + len(described).to_bytes(4, "big") + described + bytes(78)
    curve = b"curv" + bytes(4) + (1).to_bytes(4, "big") + round(gamma * 256).to_bytes(2, "big") + bytes(2)
    tags = {b"desc": text, b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249), b"cprt": b"text" + bytes(8)}
    tags |= {b"rgb"[i : i + 1] + b"XYZ": b"XYZ " + bytes(4) + fixed(*colorants[i]) for i in range(3)}
    tags |= {b"rgb"[i : i + 1] + b"TRC": curve for i in range(3)}
    table, data, start = len(tags).to_bytes(4, "big"), b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        padded = content + bytes(-len(content) % 4)
        table += tag + (start + len(data)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        data += padded
    body = table + data
    head = (128 + len(body)).to_bytes(4, "big") + bytes(4) + bytes.fromhex("02400000") + b"mntrRGB XYZ "
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + body
