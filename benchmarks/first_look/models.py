"""Models with random weights, put together as the trainer does it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from networks.adapter import Adapter, trains_weights
from networks.settings import NetworkSettings
from wan_train.assemble import ModelSettings, attach_adapter, finish_dit, streamed_names
from wan_train.models.dit.dit import Dit, DitConfig
from wan_train.models.loading import Placement, build_dit, set_attention
from wan_train.models.settings import DitSettings
from wan_train.models.stacks import block_matrices
from wan_train.placement.settings import CompileSettings, RecomputeSettings, StreamSettings
from wan_train.placement.stream import Stream
from wan_train.quantization.schemes import quantised
from wan_train.quantization.settings import WeightSettings
from wan_train.quantization.stored import plan_storage
from wan_train.storage import Header

LORA = NetworkSettings(network_dim=32, network_alpha=32)
SIZE = 0.02  # standard deviation of random matrices, about that of published ones


@dataclass(frozen=True)
class Geometry:
    """Widths of a DiT and the shape of its latents; the true ones are those of the 14B at 832x480x81."""

    dim: int = 5120
    ffn: int = 13824
    heads: int = 40
    layers: int = 40
    text_dim: int = 4096
    latents: tuple[int, ...] = (16, 21, 60, 104)

    @property
    def tokens(self) -> int:
        """Number of tokens of a video; patches are 2 x 2."""
        frames, height, width = self.latents[1:]
        return frames * height * width // 4

    def shapes(self, layers: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the weights of a model with this number of blocks."""
        with torch.device("meta"):
            model = Dit(DitConfig(self.dim, self.ffn, self.heads, layers, text_dim=self.text_dim))
        return {name: tuple(value.shape) for name, value in model.state_dict().items()}


TINY = Geometry(dim=128, ffn=256, heads=1, layers=4, text_dim=64, latents=(16, 3, 8, 8))


@dataclass(frozen=True)
class Mode:
    """One way of training: how weights are stored and placed, and what is trained with which optimizer."""

    stored: torch.dtype = torch.bfloat16
    weights: WeightSettings = field(default_factory=WeightSettings)
    streamed: bool = False  # all blocks but one
    activations: RecomputeSettings = field(default_factory=RecomputeSettings)
    compile: CompileSettings = field(default_factory=CompileSettings)
    network: NetworkSettings = LORA
    optimizer: str = "AdamW"
    fused: bool = False  # the optimizer steps in the backward pass
    offload: bool = False  # optimizer states are in CPU RAM


@dataclass(frozen=True)
class Built:
    """A model ready to train."""

    model: Dit
    adapter: Adapter
    stream: Stream


def random_weights(
    shapes: Mapping[str, tuple[int, ...]], stored: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield random weights, drawn one at a time on `device`; one seed gives the same ones on devices of one type.
    Scales of norms are near 1."""
    generator = torch.Generator(device).manual_seed(0)
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator, device=device, dtype=stored).mul_(SIZE)
        yield name, values.add_(1) if len(shape) == 1 and "norm" in name and name.endswith("weight") else values


def build(mode: Mode, geometry: Geometry, *, layers: int, device: torch.device, drawn_on: torch.device) -> Built:
    """Return the model of a mode on `device`; its weights are drawn on `drawn_on`, and the same for every mode."""
    shapes = geometry.shapes(layers)
    header = Header(shapes, dict.fromkeys(shapes, mode.stored), {})
    stream = StreamSettings(blocks_to_swap=layers - 1 if mode.streamed else 0)
    settings = ModelSettings(DitSettings(), mode.weights, stream, mode.activations, mode.compile)
    plan = plan_storage(header, block_matrices(shapes), {}, mode.weights)
    placement = Placement(device, None, streamed_names(stream, shapes))
    tensors = quantised(random_weights(shapes, mode.stored, drawn_on), plan.schemes, device)
    model = build_dit(header, tensors, source={}, placement=placement, plan=plan)
    set_attention(model, "torch", device=device, training=True)
    adapter = attach_adapter(model, mode.network, stream, seed=0, device=device)
    if not trains_weights(mode.network):
        _start_away_from_zero(adapter)
    return Built(model.train(), adapter, finish_dit(model, settings, device))


@torch.no_grad()
def _start_away_from_zero(adapter: Adapter) -> None:
    """Give the LoRA's up matrices values, so that all of its gradients differ from 0 in the first step."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapter.named_parameters():
        if "up" in name.rpartition(".")[0]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * SIZE)
