"""Layers of control models: reference image tokens, camera adapter and motion controller.

Legend: B batch, C channels, F latent frames, H W latent size, d token width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan_train.models.dit.embedding import sinusoid
from wan_train.precision import Conv2d, Linear

CAMERA_SHRINK = 8  # pixels of a camera map per side of a latent cell
MOTION_STEP = 10  # step of the sinusoid's argument per motion bucket


def embed_reference(conv: Conv2d, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Return tokens (B, H/2*W/2, d) float32 of a reference image's latents (B, C, 1, H, W) (VideoX-Fun's ref_conv)."""
    return rearrange(conv(latents[:, :, 0].to(dtype)), "B d h w -> B (h w) d").float()


class CameraAdapter(nn.Module):
    """Encode a camera map into features that are added to the tokens (VideoX-Fun's control_adapter).

    `dim_in` is the number of channels of the map: six Pluecker coordinates for each of four pixel frames.
    """

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.conv = Conv2d(dim_in * CAMERA_SHRINK**2, dim, 2, stride=2)
        self.residual_blocks = nn.ModuleList([ResidualBlock(dim)])

    def forward(self, camera: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (B, F*H/2*W/2, d) float32 of camera (B, dim_in, F, 8H, 8W), computed in `dtype`."""
        frames = rearrange(camera, "B C F X Y -> (B F) C X Y")
        cells = F.pixel_unshuffle(frames, CAMERA_SHRINK).to(dtype)
        features = self.conv(cells)
        for block in self.residual_blocks:
            features = block(features)
        return rearrange(features, "(B F) d h w -> B (F h w) d", B=len(camera)).float()


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a ReLU in between, plus the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (Conv2d(dim, dim, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like x (N, d, h, w)."""
        changed: Tensor = self.conv2(F.relu(self.conv1(x)))
        return x + changed


class MotionController(nn.Module):
    """Map a motion bucket to an offset of the blocks' modulation (DiffSynth-Studio's speedcontrol-v1)."""

    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.linear = nn.Sequential(Linear(freq_dim, dim), nn.SiLU(), Linear(dim, dim), nn.SiLU(), Linear(dim, 6 * dim))

    def forward(self, motion_bucket_id: Tensor) -> Tensor:
        """Return (B, 1, 6, d) float32 of buckets (B,), from 0 (slow) to 100 (fast)."""
        embedded = sinusoid(motion_bucket_id * MOTION_STEP, self.freq_dim)
        added: Tensor = self.linear(embedded)
        return rearrange(added, "B (six d) -> B 1 six d", six=6)
