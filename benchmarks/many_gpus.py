"""Compute the communication volume of each way to split a video over processes: the table of docs/many-gpus.md.

    python benchmarks/many_gpus.py

Counts the bytes that one process sends in a guided step of two passes, in bfloat16 inside the model and in
float32 for tokens after the last block and for velocities.
"""

from collections.abc import Callable
from dataclasses import dataclass

HALF, FULL, PASSES = 2, 4, 2  # bytes of bfloat16 and float32; passes of a guided step
COUNTS = (2, 4, 8)


@dataclass(frozen=True)
class Model:
    """Sizes of a DiT."""

    name: str
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    channels: int = 16

    @property
    def block_parameters(self) -> int:
        """Number of parameters of a block's matrices: eight of attention, two of the feed-forward."""
        return 8 * self.dim**2 + 2 * self.dim * self.ffn_dim


@dataclass(frozen=True)
class Video:
    """Height, width and frames in pixels."""

    height: int
    width: int
    frames: int

    @property
    def positions(self) -> int:
        """Number of positions of the latents: strides 4 x 8 x 8."""
        return ((self.frames - 1) // 4 + 1) * (self.height // 8) * (self.width // 8)

    @property
    def tokens(self) -> int:
        """Number of tokens, patches of 2 x 2 positions."""
        return self.positions // 4


MODELS = (Model("1.3B", 1536, 8960, 12, 30), Model("14B", 5120, 13824, 40, 40))
VIDEOS = (Video(480, 832, 81), Video(720, 1280, 81))


def exchanged_by_ulysses(tokens: float, dim: int, count: int, *, width: int = HALF) -> float:
    """Return bytes per process and block: an all-to-all of a share of the tokens each for queries, keys, values and the
    result; a process keeps its own part."""
    return 4 * tokens / count * dim * width * (count - 1) / count


def exchanged_by_ring(tokens: float, dim: int, count: int, *, width: int = HALF) -> float:
    """Return bytes per process and block: keys and values of a share of the tokens, passed on to all processes."""
    return 2 * tokens / count * dim * width * (count - 1)


def gathered(tokens: float, dim: int, count: int) -> float:
    """Return bytes per process and pass: its share of the tokens after the last block, sent to all others."""
    return tokens / count * dim * FULL * (count - 1)


def _ulysses(model: Model, video: Video, count: int) -> float | None:
    if model.num_heads % count:
        return None
    blocks = model.num_layers * exchanged_by_ulysses(video.tokens, model.dim, count)
    return PASSES * (blocks + gathered(video.tokens, model.dim, count))


def _ring(model: Model, video: Video, count: int) -> float | None:
    blocks = model.num_layers * exchanged_by_ring(video.tokens, model.dim, count)
    return PASSES * (blocks + gathered(video.tokens, model.dim, count))


def _velocity(model: Model, video: Video) -> float:
    return model.channels * video.positions * FULL


def _halves(model: Model, video: Video, count: int) -> float | None:
    """Return bytes with the guidance passes on two halves, each of which splits the tokens of its pass by Ulysses."""
    if count == 2:
        return _velocity(model, video)
    inside = _ulysses(model, video, count // 2)
    return None if inside is None else inside / PASSES + _velocity(model, video)


def _sharded(model: Model, video: Video, count: int) -> float | None:
    """Return bytes with sharded weights: each pass gathers the weights of all blocks; a process sends its share."""
    return PASSES * model.num_layers * model.block_parameters * HALF * (count - 1) / count


WAYS: dict[str, Callable[[Model, Video, int], float | None]] = {
    "`--ulysses_size N`": _ulysses,
    "`--ring_size N`": _ring,
    "`--cfg_size 2`, `--ulysses_size N/2`": _halves,
    "`--dit_fsdp`, beside these": _sharded,
}


def _shown(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| model | video | way | " + " | ".join(f"{count} GPUs" for count in COUNTS) + " |",
        "|---|---|---|" + "---|" * len(COUNTS),
    ]
    for model in MODELS:
        for video in VIDEOS:
            for way, exchanged in WAYS.items():
                cells = (_shown(exchanged(model, video, count)) for count in COUNTS)
                size = f"{video.height}x{video.width}x{video.frames}"
                lines.append(f"| {model.name} | {size} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
