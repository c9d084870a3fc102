"""A tiny random Wan2.1 text-to-video model in the official layout, and a few clips to train it on.

    python tests/tiny/make.py FOLDER

Names, prefixes and file formats are those of the published files and only the sizes are small, so that the five
commands run in seconds on a CPU. The weights are drawn by name: the same names give the same model everywhere.
"""

import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import av
import numpy
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor

from examples.nano import words

DIT = "wan_t2v_tiny.safetensors"
VAE = "Wan2.1_VAE.safetensors"
T5 = "models_t5_umt5-xxl-enc-bf16.safetensors"
TOKENIZER = "google/umt5-xxl"
CLIPS = "clips"
DATA = "data.toml"
PROMPTS = "prompts.txt"

SIZE = (96, 64)  # width, height
FRAMES = 17
TEXT_DIM = 64

# caption: colour, shape, and direction (x, y)
SCENES: dict[str, tuple[str, str, tuple[float, float]]] = {
    "a red circle moves to the right": ("#d8302f", "circle", (1.0, 0.0)),
    "a blue square moves down": ("#2f5fd8", "square", (0.0, 1.0)),
    "a green triangle moves to the left": ("#2fae4d", "triangle", (-1.0, 0.0)),
}

Shapes = dict[str, tuple[int, ...]]


def make(folder: Path) -> None:
    """Write everything that the five commands need to `folder`."""
    make_models(folder)
    draw_clips(folder / CLIPS)
    write_dataset(folder / DATA, clips=folder / CLIPS, cache=folder / "cache")
    prompt = next(iter(SCENES))
    options = f"--w {SIZE[0]} --h {SIZE[1]} --f {FRAMES} --s 4 --d 1 --l 3.0 --fs 3.0"
    (folder / PROMPTS).write_text(f"# one prompt per line\n{prompt} {options}\n", encoding="utf-8")


def make_models(folder: Path) -> None:
    """Write DiT, VAE, text encoder and tokenizer under their official names."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = make_tokenizer(folder / TOKENIZER)
    save(folder / DIT, dit_shapes(), torch.bfloat16)
    save(folder / VAE, vae_shapes(), torch.float32)
    save(folder / T5, t5_shapes(vocabulary), torch.bfloat16)


def dit_shapes(
    *,
    dim: int = 256,
    ffn_dim: int = 512,
    num_layers: int = 2,
    text_dim: int = TEXT_DIM,
    in_dim: int = 16,
    channels: int = 16,
) -> Shapes:
    """Return names and shapes of a Wan2.1 T2V DiT; `dim` is 128 per head, `channels` are those of the latents."""
    shapes: Shapes = {"patch_embedding.weight": (dim, in_dim, 1, 2, 2), "patch_embedding.bias": (dim,)}
    for name, out, width in (
        ("text_embedding.0", dim, text_dim),
        ("text_embedding.2", dim, dim),
        ("time_embedding.0", dim, 256),
        ("time_embedding.2", dim, dim),
        ("time_projection.1", 6 * dim, dim),
        ("head.head", 4 * channels, dim),
    ):
        shapes |= _linear(name, out, width)
    shapes["head.modulation"] = (1, 2, dim)
    for block in (f"blocks.{i}" for i in range(num_layers)):
        shapes[f"{block}.modulation"] = (1, 6, dim)
        for attention in (f"{block}.self_attn", f"{block}.cross_attn"):
            for part in "qkvo":
                shapes |= _linear(f"{attention}.{part}", dim, dim)
            shapes |= {f"{attention}.norm_q.weight": (dim,), f"{attention}.norm_k.weight": (dim,)}
        shapes |= {f"{block}.norm3.weight": (dim,), f"{block}.norm3.bias": (dim,)}
        shapes |= _linear(f"{block}.ffn.0", ffn_dim, dim) | _linear(f"{block}.ffn.2", dim, ffn_dim)
    return shapes


def vae_shapes(dim: int = 8, *, latents: int = 16) -> Shapes:
    """Return names and shapes of the Wan2.1 VAE at the width `dim` (published: 96)."""
    top = 4 * dim
    shapes = _conv("encoder.conv1", dim, 3, 3) | _conv("decoder.conv1", top, latents, 3)
    width = dim
    for i, (kind, out) in enumerate(_stages([dim, 2 * dim, top, top], blocks=2, times=(False, True, True))):
        shapes |= _vae_part(f"encoder.downsamples.{i}", kind, width, out)
        width = out
    width = top
    for i, (kind, out) in enumerate(_stages([top, top, 2 * dim, dim], blocks=3, times=(True, True, False))):
        # On the decoder side, a resampling halves the channels.
        out = width // 2 if kind != "block" else out
        shapes |= _vae_part(f"decoder.upsamples.{i}", kind, width, out)
        width = out
    for side, out in (("encoder", 2 * latents), ("decoder", 3)):
        middle = f"{side}.middle"
        shapes |= _vae_part(f"{middle}.0", "block", top, top) | _vae_part(f"{middle}.2", "block", top, top)
        shapes |= {f"{middle}.1.norm.gamma": (top, 1, 1)}
        shapes |= _conv2d(f"{middle}.1.to_qkv", 3 * top, top, 1) | _conv2d(f"{middle}.1.proj", top, top, 1)
        last = top if side == "encoder" else dim
        shapes |= {f"{side}.head.0.gamma": (last, 1, 1, 1)} | _conv(f"{side}.head.2", out, last, 3)
    return shapes | _conv("conv1", 2 * latents, 2 * latents, 1) | _conv("conv2", latents, latents, 1)


def t5_shapes(
    vocabulary: int, *, dim: int = TEXT_DIM, ffn_dim: int = 128, num_layers: int = 2, num_heads: int = 4
) -> Shapes:
    """Return names and shapes of the official UMT5 encoder."""
    shapes: Shapes = {"token_embedding.weight": (vocabulary, dim), "norm.weight": (dim,)}
    for block in (f"blocks.{i}" for i in range(num_layers)):
        shapes |= {f"{block}.norm{n}.weight": (dim,) for n in (1, 2)}
        shapes |= {f"{block}.attn.{part}.weight": (dim, dim) for part in "qkvo"}
        shapes |= {f"{block}.pos_embedding.embedding.weight": (32, num_heads)}
        shapes |= {f"{block}.ffn.{part}.weight": (ffn_dim, dim) for part in ("gate.0", "fc1")}
        shapes |= {f"{block}.ffn.fc2.weight": (dim, ffn_dim)}
    return shapes


def make_tokenizer(folder: Path) -> int:
    """Write a tokenizer with one token per word of the scenes; return its size."""
    return words.make_tokenizer(folder, sorted({word for caption in SCENES for word in caption.split()}))


def draw_clips(folder: Path, *, size: tuple[int, int] = SIZE, num_frames: int = 24, fps: int = 16) -> list[Path]:
    """Write one clip and one caption file per scene; return the paths of the clips."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for caption in SCENES:
        path = folder / f"{'_'.join(caption.split()[1:3])}.mp4"
        _write_clip(path, draw_frames(caption, size=size, num_frames=num_frames), fps=fps)
        path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def draw_frames(caption: str, *, size: tuple[int, int] = SIZE, num_frames: int = 24) -> Iterator[Image.Image]:
    """Yield the frames of a scene: one shape that crosses a grey background."""
    colour, shape, (right, down) = SCENES[caption]
    width, height = size
    radius = min(size) * 0.22
    for i in range(num_frames):
        way = i / max(num_frames - 1, 1) - 0.5
        x, y = width * (0.5 + 0.6 * right * way), height * (0.5 + 0.5 * down * way)
        image = Image.new("RGB", size, "#b8b4ac")
        pen = ImageDraw.Draw(image)
        if shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        else:
            pen.regular_polygon((x, y, radius * 1.2), 4 if shape == "square" else 3, fill=colour)
        yield image


def write_dataset(path: Path, *, clips: Path, cache: Path, size: tuple[int, int] = SIZE, frames: int = FRAMES) -> None:
    """Write the TOML for the drawn clips."""
    path.write_text(
        f"""[general]
resolution = [{size[0]}, {size[1]}]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true

[[datasets]]
video_directory = "{clips.resolve().as_posix()}"
cache_directory = "{cache.resolve().as_posix()}"
target_frames = [{frames}]
frame_extraction = "head"
""",
        encoding="utf-8",
    )


def draw_weight(name: str, shape: Sequence[int]) -> Tensor:
    """Return a float32 parameter that depends only on its name and shape, scaled to keep activations near one."""
    values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "modulation" or leaf == "bias" or "pos_embedding" in name:
        return values * 0.1
    if leaf == "gamma" or len(shape) == 1:
        return 1 + values * 0.1
    if name == "token_embedding.weight":
        return values
    return values / math.sqrt(math.prod(shape[1:]))


def save(path: Path, shapes: Shapes, dtype: torch.dtype) -> None:
    """Write weights with these names and shapes to a file."""
    save_file({name: draw_weight(name, shape).to(dtype) for name, shape in shapes.items()}, path)


def _linear(name: str, out: int, width: int) -> Shapes:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def _conv(name: str, out: int, width: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (out, width, kernel, kernel, kernel), f"{name}.bias": (out,)}


def _conv2d(name: str, out: int, width: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (out, width, kernel, kernel), f"{name}.bias": (out,)}


def _stages(widths: Sequence[int], *, blocks: int, times: Sequence[bool]) -> Iterator[tuple[str, int]]:
    """Yield the flat list of a VAE side: (kind, output channels), with a resampling between two stages."""
    for stage, width in enumerate(widths):
        yield from (("block", width) for _ in range(blocks))
        if stage < len(times):
            yield ("resample3d" if times[stage] else "resample2d"), width


def _vae_part(name: str, kind: str, width: int, out: int) -> Shapes:
    """Return the shapes of a residual block, or of a resampling in space (2d) or space and time (3d)."""
    if kind == "block":
        shapes: Shapes = {f"{name}.residual.0.gamma": (width, 1, 1, 1), f"{name}.residual.3.gamma": (out, 1, 1, 1)}
        shapes |= _conv(f"{name}.residual.2", out, width, 3) | _conv(f"{name}.residual.6", out, out, 3)
        return shapes | (_conv(f"{name}.shortcut", out, width, 1) if out != width else {})
    shapes = _conv2d(f"{name}.resample.1", out, width, 3)
    if kind == "resample3d":
        frames = width if name.startswith("encoder") else 2 * width  # on the decoder side, each frame becomes two
        shapes |= {f"{name}.time_conv.weight": (frames, width, 3, 1, 1), f"{name}.time_conv.bias": (frames,)}
    return shapes


def _write_clip(path: Path, frames: Iterator[Image.Image], *, fps: int) -> None:
    with av.open(str(path), "w") as file:
        stream = None
        for image in frames:
            if stream is None:
                stream = file.add_stream("libx264", rate=fps)
                stream.width, stream.height = image.size
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": "18"}
            file.mux(stream.encode(av.VideoFrame.from_ndarray(numpy.asarray(image), format="rgb24")))
        if stream is not None:
            file.mux(stream.encode())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    make(Path(sys.argv[1]))
    print(f"wrote a tiny model and {len(SCENES)} clips to {sys.argv[1]}")
