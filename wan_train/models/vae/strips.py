"""The VAE's down and up layers with each process computing a strip of rows of the frames.

A strip is extended by the rows of its neighbours that its result depends on (halo), derived from the layers' kernels;
after each layer, rows that no later layer needs are dropped, so that little is computed twice: 7 rows at each inner
edge at pixel resolution, 13 at latent resolution (published Wan2.1 decoder). At the frame's borders layers pad as
usual. The concatenated strips therefore equal the undivided result. Layers that see the whole frame, the middle with
its attention, run in every process.

B batch, C channels, F frames of a chunk, T latent frames of it, H W pixels, h w latent positions; a latent row is one
of h.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from wan_train.distributed.groups import Split
from wan_train.models.vae.coders import Decoder, Encoder, fold_patches, unfold_patches
from wan_train.models.vae.layers import CausalConv3d, Downsample, FeatureCache, ResidualBlock, Upsample, run_head
from wan_train.models.vae.wan22 import DownStage, UpStage

Layer = Callable[[Tensor, FeatureCache], Tensor]


@dataclass(frozen=True)
class Reach:
    """Number of halo rows above and below that a strip needs of an input."""

    above: int = 0
    below: int = 0


@dataclass(frozen=True)
class Stage:
    """A layer, the reach of its input, and the rows of its input and output per latent row."""

    run: Layer
    reach: Reach
    rows_in: int
    rows_out: int


@dataclass(frozen=True)
class Strip:
    """A range of `num_rows` latent rows."""

    rows: range
    num_rows: int

    def needed(self, stage: Stage) -> range:
        """Return the rows of a stage's input that this strip depends on."""
        start = self.rows.start * stage.rows_in - stage.reach.above
        stop = self.rows.stop * stage.rows_in + stage.reach.below
        return range(max(start, 0), min(stop, self.num_rows * stage.rows_in))

    def run(self, stages: Sequence[Stage], x: Tensor, cache: FeatureCache, *, start: int) -> Tensor:
        """Return the strip's rows of the stages' output for `x` (B, C, F, rows, W), whose first row is `start`."""
        for stage in stages:
            needed = self.needed(stage)
            x = stage.run(_cut(x, needed.start - start, needed.stop - start), cache)
            start = needed.start * stage.rows_out // stage.rows_in
        own = stages[-1].rows_out
        return _cut(x, self.rows.start * own - start, self.rows.stop * own - start)


@dataclass(frozen=True)
class Strips:
    """The processes with one strip each: ceil(h / processes) latent rows, fewer in the last one.

    If there are fewer latent rows than processes, the remaining processes compute the last row, which is discarded.
    """

    split: Split

    def narrow(self, encoder: Encoder, pixels: Tensor, cache: FeatureCache) -> Tensor:
        """Return `encoder.narrow` of pixels (B, 3, F, H, W) in every process; all must be given the same pixels."""
        stages, patch = encoder_stages(encoder), encoder.patch
        strip = self._strip(pixels.shape[-2] // (patch * stages[0].rows_in))
        needed = strip.needed(stages[0])
        x = fold_patches(_cut(pixels, needed.start * patch, needed.stop * patch), patch)
        return self._gathered(strip.run(stages, x, cache, start=needed.start), strip.num_rows)

    def widen(self, decoder: Decoder, features: Tensor, cache: FeatureCache) -> Tensor:
        """Return this process's rows of `decoder.widen` of features (B, C, T, h, w); all must be given the same."""
        return self._strip(features.shape[-2]).run(decoder_stages(decoder), features, cache, start=0)

    def join(self, part: Tensor, num_rows: int) -> Tensor | None:
        """Return the frames (B, C, F, H, W) in the first process, None in others.

        `part` are this process's rows of frames that correspond to `num_rows` latent rows.
        """
        size = self._size(num_rows)
        if self.split.rank:
            if self.split.rank * size < num_rows:
                dist.send(part.contiguous(), group=self.split.group, group_dst=0)
            return None
        parts, stride = [part], part.shape[-2] // size
        for rank, start in enumerate(range(size, num_rows, size), start=1):
            height = stride * min(size, num_rows - start)
            parts.append(part.new_empty((*part.shape[:-2], height, part.shape[-1])))
            dist.recv(parts[-1], group=self.split.group, group_src=rank)
        return torch.cat(parts, dim=-2)

    def _size(self, num_rows: int) -> int:
        return -(-num_rows // self.split.size)

    def _strip(self, num_rows: int) -> Strip:
        start = min(self.split.rank * self._size(num_rows), num_rows - 1)
        return Strip(range(start, min(start + self._size(num_rows), num_rows)), num_rows)

    def _gathered(self, part: Tensor, num_rows: int) -> Tensor:
        """Gather the features of all strips in every process."""
        padded = F.pad(part, (0, 0, 0, self._size(num_rows) - part.shape[-2])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.split.size)]
        dist.all_gather(parts, padded, group=self.split.group)
        return _cut(torch.cat(parts, dim=-2), 0, num_rows)


def encoder_stages(encoder: Encoder) -> list[Stage]:
    """Return the layers of `Encoder.narrow` after patch folding."""
    return _stages([encoder.conv1, *encoder.downsamples], rows_out=1)


def decoder_stages(decoder: Decoder) -> list[Stage]:
    """Return the layers of `Decoder.widen`; the last one includes patch unfolding."""
    layers = [*decoder.upsamples, decoder.head["2"]]
    *inner, last = _stages(layers, rows_out=2 ** sum(map(_doublings, layers)))

    def end(x: Tensor, cache: FeatureCache) -> Tensor:
        return unfold_patches(run_head(decoder.head, x, cache), decoder.patch)

    return [*inner, Stage(end, last.reach, last.rows_in, last.rows_out * decoder.patch)]


def _stages(layers: Sequence[nn.Module], *, rows_out: int) -> list[Stage]:
    """Return stages of layers whose last output has `rows_out` rows per latent row."""
    stages: list[Stage] = []
    reach = Reach()
    for layer in reversed(layers):
        reach, doublings = seen(layer, reach), _doublings(layer)
        rows_in = rows_out >> doublings if doublings > 0 else rows_out << -doublings
        stages.append(Stage(layer, reach, rows_in, rows_out))
        rows_out = rows_in
    return stages[::-1]


def seen(layer: nn.Module, reach: Reach) -> Reach:
    """Return the reach of a layer's input from that of its output; downsampling layers need whole pairs of rows.

    Raises TypeError for a layer whose reach is unknown; with attention, for example, it sees the whole frame.
    """
    match layer:
        case CausalConv3d():
            side = layer.kernel_size[1] // 2
            return Reach(reach.above + side, reach.below + side)
        case Upsample():  # a row and its neighbours, in an input with doubled rows
            return Reach((reach.above + 2) // 2, (reach.below + 2) // 2)
        case Downsample():  # row i sees rows 2i, 2i + 1 and 2i + 2
            return _in_pairs(Reach(2 * reach.above, 2 * reach.below + 1))
        case ResidualBlock() | UpStage() | DownStage():
            for inner in reversed(list(_inner(layer))):
                reach = seen(inner, reach)
            return _in_pairs(reach) if _doublings(layer) < 0 else reach
    raise TypeError(f"unknown reach of {type(layer).__name__}")


def _inner(layer: nn.Module) -> Iterable[nn.Module]:
    """Return the sequential layers inside a layer; a parallel shortcut has no larger reach."""
    match layer:
        case ResidualBlock():
            return layer.residual["2"], layer.residual["6"]
        case UpStage():
            return layer.upsamples
        case DownStage():
            return layer.downsamples
    return ()


def _doublings(layer: nn.Module) -> int:
    """Return how often a layer doubles the number of rows; negative for halving."""
    own = int(isinstance(layer, Upsample)) - int(isinstance(layer, Downsample))
    return own + sum(map(_doublings, _inner(layer)))


def _in_pairs(reach: Reach) -> Reach:
    return Reach(reach.above + reach.above % 2, reach.below + reach.below % 2)


def _cut(x: Tensor, start: int, stop: int) -> Tensor:
    """Return rows of a tensor (B, C, F, rows, W) in channels-last memory."""
    return x[..., start:stop, :].contiguous(memory_format=torch.channels_last_3d)
