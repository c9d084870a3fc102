"""The two VAEs at a small size, and pixels and latents to give them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.parity.golden import load_case
from tests.tiny.make import draw_weight
from tests.tiny.vae22 import vae22_shapes


def draw_pixels(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def draw_latents(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def draw_smooth(frames: int, height: int, width: int) -> Tensor:
    t, y, x = torch.meshgrid(*(torch.linspace(0, 1, side) for side in (frames, height, width)), indexing="ij")
    colours = torch.sin(6 * x + 2 * y + t), torch.cos(5 * y - 3 * x + 2 * t), torch.sin(4 * x * x + 5 * y - t)
    return 0.8 * torch.stack(colours)[None]


@dataclass(frozen=True, eq=False)
class SmallVae:
    """A VAE's weights, the channels of its latents, and the pixels to a cell of them."""

    name: str
    weights: dict[str, Tensor]
    channels: int
    stride: int

    def pixels(self, clips: int, frames: int, rows: int, columns: int) -> Tensor:
        """Pixels (clips, 3, frames, H, W) of so many rows and columns of cells."""
        return draw_pixels(clips, 3, frames, rows * self.stride, columns * self.stride)

    def latents(self, clips: int, frames: int, rows: int, columns: int) -> Tensor:
        """Latents (clips, channels, frames, rows, columns)."""
        return draw_latents(clips, self.channels, frames, rows, columns)


WAN21 = SmallVae("wan2.1", load_case("wan21_vae").state_dict(), 16, 8)  # eight channels wide
WAN22 = SmallVae("wan2.2", {name: draw_weight(name, shape) for name, shape in vae22_shapes().items()}, 48, 16)
