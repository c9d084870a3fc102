"""Train the VAE of the small model: first towards a linear code of the clips (a PCA of patches), then freely.

The teacher is linear because an untrained encoder and decoder converge slowly together: the decoder learns to draw from
the PCA's codes and the encoder to produce them, separately, and only then are both trained together.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from examples.nano.state import Trail, load_state, save_state
from examples.nano.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, draw_clip
from wan_train.models.vae.geometry import Geometry
from wan_train.models.vae.layers import FeatureCache
from wan_train.models.vae.vae import WanVAE
from wan_train.models.vae.wan21 import LATENT_MEAN, LATENT_STD

GEOMETRY = Geometry(base=12, widths=(12, 24, 48, 48), num_blocks=1)
CODES = GEOMETRY.latent_channels
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of axes; the faster layout
_LENGTHS = ((0.45, 5), (0.7, 9), (1.0, 17))  # (until this share of the time, frames per clip)
NOISE = 0.1  # relative noise added to the latents while both are trained together, so that near codes look alike


@dataclass(frozen=True)
class VaeSettings:
    """Duration and speed: `minutes` of wall-clock time, `alone` of it with the teacher; one seed per batch."""

    minutes: float = 22.0
    alone: float = 0.3
    rate: float = 2e-3
    batch: int = 16


def draw_batch(count: int, num_frames: int, seed: int) -> Tensor:
    """Return clips (B, 3, F, 32, 32) in [-1, 1], half of the shapes in arbitrary colours: the VAE must not depend on
    words."""
    draws = np.random.Generator(np.random.PCG64([seed, 1]))
    clips = []
    for index in range(count):
        known = list(COLOURS.values())[draws.integers(len(COLOURS))]
        colour = known if draws.random() < 0.5 else tuple(int(v) for v in draws.integers(0, 256, 3))
        background = list(BACKGROUNDS.values())[draws.integers(len(BACKGROUNDS))]
        motion = list(MOTIONS.values())[draws.integers(len(MOTIONS))]
        clip = draw_clip(SHAPES[draws.integers(len(SHAPES))], motion, colour, background, seed * 1000 + index)  # type: ignore[arg-type]
        start = draws.integers(0, len(clip) - num_frames + 1)
        clips.append(clip[start : start + num_frames])
    return rearrange(torch.from_numpy(np.stack(clips)).float() / 127.5 - 1, "B F H W C -> B C F H W")


class Teacher:
    """Principal components of 8x8 patches of the first frame, and of 4x8x8 patches of the following frames."""

    def __init__(self, clips: Tensor) -> None:
        self.bases = [self._basis(part) for part in self._patches(clips)]

    def codes(self, clips: Tensor) -> Tensor:
        """Return codes (B, 16, T, 4, 4) of clips, each with about unit variance."""
        coded = [((p - mean) @ basis) for p, (mean, basis) in zip(self._patches(clips), self.bases, strict=True)]
        return torch.cat([rearrange(code, "B T h w c -> B c T h w") for code in coded], dim=2)

    def _patches(self, clips: Tensor) -> list[Tensor]:
        first = rearrange(clips[:, :, :1], "B C f (h y) (w x) -> B f h w (C y x)", y=8, x=8)
        rest = rearrange(clips[:, :, 1:], "B C (T f) (h y) (w x) -> B T h w (f C y x)", f=4, y=8, x=8)
        return [first, rest]

    def _basis(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        rows = patches.flatten(0, -2)
        mean = rows.mean(0)
        values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
        return mean, vectors[:, -CODES:].flip(1) / values[-CODES:].flip(0).clamp(min=1e-8) ** 0.25


def make_vae(seed: int = 0) -> WanVAE:
    """Return a VAE with random weights whose variance preserves the scale of activations."""
    torch.manual_seed(seed)
    vae = WanVAE(GEOMETRY)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    for parameter in vae.parameters():
        if parameter.ndim in _CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=_CHANNELS_LAST[parameter.ndim])
    return vae


def encode(vae: WanVAE, pixels: Tensor) -> Tensor:
    """Return the means (B, 16, T, 4, 4) of clips, with gradient; the first frame, then all others at once."""
    cache = FeatureCache()
    parts = [vae.conv1(vae.encoder(chunk, cache), cache) for chunk in _chunks(pixels)]
    return torch.cat(parts, dim=2).chunk(2, dim=1)[0]


def decode(vae: WanVAE, latents: Tensor) -> Tensor:
    """Return the clips (B, 3, F, 32, 32) of latents, with gradient."""
    cache = FeatureCache()
    return torch.cat([vae.decoder(vae.conv2(chunk, cache), cache) for chunk in _chunks(latents)], dim=2)


def _chunks(x: Tensor) -> Iterator[Tensor]:
    yield x[:, :, :1].contiguous(memory_format=torch.channels_last_3d)
    if x.shape[2] > 1:
        yield x[:, :, 1:].contiguous(memory_format=torch.channels_last_3d)


def train_vae(work: Path, settings: VaeSettings, trail: Trail) -> WanVAE:
    """Return the trained VAE, its latents not yet normalised; resumes from the state in `work`."""
    vae, teacher = make_vae(), Teacher(draw_batch(600, 17, 10**6))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.rate, weight_decay=0.0, betas=(0.9, 0.99))
    average = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    step, spent = load_state(work / "vae.pt", vae, optimizer, average)
    began, saved = time.monotonic() - spent, time.monotonic()
    while (share := (time.monotonic() - began) / (60 * settings.minutes)) < 1:
        alone = share < settings.alone
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * math.cos(math.pi / 2 * share) ** 2)
        # The causal decoder must work up to the end of a clip, which short clips do not test.
        num_frames = next(frames for until, frames in _LENGTHS if share < until)
        clips = draw_batch(max(1, settings.batch * 9 // max(9, num_frames)), num_frames, step)
        if alone:
            codes = teacher.codes(clips)
            loss = F.mse_loss(decode(vae, codes), clips) + 0.1 * F.mse_loss(encode(vae, clips), codes)
        else:
            latents = encode(vae, clips)
            noisy = latents + NOISE * latents.detach().std() * torch.randn_like(latents)
            loss = F.mse_loss(decode(vae, noisy), clips) + 1e-4 * latents.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.998, step / (step + 20))
        for name, tensor in vae.state_dict().items():
            average[name].lerp_(tensor, 1 - decay)
        trail.note("vae", step, loss.item(), "teacher" if alone else "joint")
        if time.monotonic() - saved > 60:
            save_state(work / "vae.pt", vae, optimizer, average, step=step, spent=time.monotonic() - began)
            saved = time.monotonic()
    save_state(work / "vae.pt", vae, optimizer, average, step=step, spent=time.monotonic() - began)
    vae.load_state_dict(average)
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def normalise_latents(vae: WanVAE) -> None:
    """Fold the mean and standard deviation of the latents into the 1x1 convolutions around them, so that with the
    published constants they have mean 0 and standard deviation 1."""
    latents = encode(vae, draw_batch(256, 17, 2 * 10**6))
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    wanted_mean, wanted_std = torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD)
    gain = wanted_std / std
    # Encoder side: y -> (y - mean) * gain + wanted_mean, on the half with the means.
    vae.conv1.weight[:CODES] *= gain.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:CODES] = (vae.conv1.bias[:CODES] - mean) * gain + wanted_mean  # type: ignore[index]
    # Decoder side: the inverse first.
    vae.conv2.bias += (vae.conv2.weight.flatten(1) @ (mean - wanted_mean / gain)).view(-1)  # type: ignore[operator]
    vae.conv2.weight /= gain.view(1, -1, 1, 1, 1)
