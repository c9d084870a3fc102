"""The Wan diffusion transformer, as the official Wan2.1 code computes it.

Legend: B batch, C channels, F latent frames, H W latent size, P patches of one frame, L = F*P tokens, T context tokens
(512 of the text, behind those of images), I image tokens, N heads, D head width, d = N*D the width of a token.

Precision: products are taken in the dtype of the embedded text; norms, modulation, gates, residual sums, the time
embedding and the head in float32. Modulation is kept per sample or per latent frame, never per token: (B, G, 6, d) with
G = 1 or F.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan_train.models.dit.layers import GELU, Attention, ImageAttention, ImageEmbedding
from wan_train.models.dit.layers import DitConfig as DitConfig
from wan_train.models.dit.norms import LayerNorm
from wan_train.models.dit.rope import rotations
from wan_train.models.variants import TEXT_LENGTH
from wan_train.precision import Linear, float64_device


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, the first and last modulated by time."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = LayerNorm(dim, config.eps, elementwise_affine=False)
        self.self_attn = Attention(config)
        self.norm3 = LayerNorm(dim, config.eps)
        self.cross_attn = ImageAttention(config) if config.image_dim else Attention(config)
        self.norm2 = LayerNorm(dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(Linear(dim, config.ffn_dim), GELU(), Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(self, x: Tensor, context: Tensor, time: Tensor, turns: Tensor) -> Tensor:
        """x (B, L, d) float32, context (B, T, d), time (B, G, 6, d) float32, turns (2, L, 1, D) -> like x."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + time).unbind(2)
        dtype = context.dtype
        modulated = modulate(self.norm1(x), shift1, scale1).to(dtype)
        x = gated(x, self.self_attn(modulated, modulated, turns), gate1)
        x = x + self.cross_attn(self.norm3(x).to(dtype), context)
        return gated(x, self.ffn(modulate(self.norm2(x), shift2, scale2).to(dtype)), gate2)


class Head(nn.Module):
    """From tokens to the velocity of their patches, in float32."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        pt, ph, pw = config.patch_size
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = Linear(config.dim, pt * ph * pw * config.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, L, d), time (B, G, d) -> (B, L, patch*C)."""
        shift, scale = (self.modulation.float() + time.unsqueeze(2)).unbind(2)
        return self.head(modulate(self.norm(x), shift, scale))


@dataclass(frozen=True)
class EmbeddedContext:
    """What `Dit.embed_context` made: `tokens` (B, T, d), for as many passes as see the same context."""

    tokens: Tensor


@dataclass
class Embedded:
    """What `Dit.begin` made of the inputs, all that the blocks and the head need.

    `tokens` (B, L, d) float32, which the blocks replace: they are large, and nothing else may hold them. `context`
    (B, T, d), `time` (B, G, d) and `modulation` (B, G, 6, d) float32 for G groups of equally many tokens, `rope`
    (2, L, 1, D), `grid` the numbers of patches (F, H, W), `skipped` the indices of `blocks` that this pass leaves out.
    """

    tokens: Tensor
    context: Tensor
    time: Tensor
    modulation: Tensor
    rope: Tensor
    grid: tuple[int, int, int]
    skipped: frozenset[int] = frozenset()


class Dit(nn.Module):
    """The whole transformer; see `load_dit` for its call.

    A pass is `begin`, `run_blocks`, `finish`. What shortens a pass or shares it out wraps `run_blocks`, by
    `wrap_run_blocks`; nothing else replaces a part of it.
    """

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, dim), GELU(), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        if config.image_dim:
            self.img_emb = ImageEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: list[Tensor] | Tensor | EmbeddedContext,
        *,
        image_latents: Tensor | None = None,
        clip_features: Tensor | None = None,
        reference_latents: Tensor | None = None,
        camera: Tensor | None = None,
        vace_context: Tensor | None = None,
        vace_scale: float = 1.0,
        motion_bucket_id: Tensor | None = None,
        frame_positions: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, C, F, H, W) in float32 of noisy `latents` (B, C, F, H, W).

        `timestep` (B,) or (B, F) in 0..1000; `context` a list of (L_i, text_dim) or (B, 512, text_dim), or what
        `embed_context` made of that and of `clip_features`; `frame_positions` (F,) where each latent frame is in time,
        else 0..F-1. Models for images read `image_latents` (B, in_dim - C, F, H, W), a mask and latents, behind the
        noisy ones, and those of Wan2.1 `clip_features` (B, I, image_dim). Inputs that the model has no weights for are
        a ValueError, and so are missing ones.
        """
        refuse_inputs(
            image_latents=image_latents if self.config.in_dim == latents.shape[1] else None,
            reference_latents=reference_latents,
            camera=camera,
            vace_context=vace_context,
            motion_bucket_id=motion_bucket_id,
        )
        state = self.begin(
            latents,
            timestep,
            context,
            image_latents=image_latents,
            clip_features=clip_features,
            frame_positions=frame_positions,
        )
        self.run_blocks(state)
        return self.finish(state)

    def begin(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: list[Tensor] | Tensor | EmbeddedContext,
        *,
        image_latents: Tensor | None = None,
        clip_features: Tensor | None = None,
        frame_positions: Tensor | None = None,
    ) -> Embedded:
        """Embed the inputs of `forward`."""
        if image_latents is not None:
            latents = torch.cat([latents, image_latents.to(latents)], dim=1)
        grid = self._grid(latents)
        tokens = self._embed(latents)
        time, modulation = self._embed_time(timestep)
        if not isinstance(context, EmbeddedContext):
            context = self.embed_context(context, clip_features, device=latents.device)
        head_width = self.config.dim // self.config.num_heads
        rope = rotations(grid, head_width, device=latents.device, frames=frame_positions)
        return Embedded(tokens, context.tokens, time, modulation, rope, grid)

    def run_blocks(self, state: Embedded) -> None:
        """Send the tokens of a pass through all blocks but the skipped ones."""
        for index, block in enumerate(self.blocks):
            if index not in state.skipped:
                state.tokens = block(state.tokens, state.context, state.modulation, state.rope)

    def finish(self, state: Embedded) -> Tensor:
        """The velocity (B, C, F, H, W) in float32 of the tokens of a pass."""
        return self._unpatchify(self.head(state.tokens, state.time), state.grid)

    def embed_context(
        self, context: list[Tensor] | Tensor, clip_features: Tensor | None = None, *, device: torch.device
    ) -> EmbeddedContext:
        """Texts and the images' tokens at the model's width: what every step of a sampling run has in common.

        ValueError where the model reads `clip_features` and has none, or the other way round.
        """
        text: Tensor = self.text_embedding(pad_context(context, self.config, device).to(self.compute_dtype))
        if (clip_features is not None) != bool(self.config.image_dim):
            raise ValueError(
                f"this model {'has no weights for' if clip_features is not None else 'needs'} clip_features"
            )
        if clip_features is None:
            return EmbeddedContext(text)
        return EmbeddedContext(torch.cat([self.img_emb(clip_features.to(device), self.compute_dtype), text], dim=1))

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        channels, *size = latents.shape[1:]
        if channels != self.config.in_dim:
            raise ValueError(
                f"the model takes {self.config.in_dim} channels of latents and image_latents together, not {channels}"
            )
        if any(n % p for n, p in zip(size, self.config.patch_size, strict=True)):
            raise ValueError(f"latents of {size} do not divide into patches of {list(self.config.patch_size)}")
        return tuple(n // p for n, p in zip(size, self.config.patch_size, strict=True))  # type: ignore[return-value]

    def _embed(self, latents: Tensor) -> Tensor:
        """Latents to tokens (B, L, d) float32. The convolution's stride is its kernel, so it is a matrix product."""
        pt, ph, pw = self.config.patch_size
        patches = rearrange(latents, "B C (F t) (H h) (W w) -> B (F H W) (C t h w)", t=pt, h=ph, w=pw)
        weight, bias = self.patch_embedding.weight.flatten(1), self.patch_embedding.bias
        assert bias is not None
        dtype = self.compute_dtype
        return F.linear(patches.to(dtype), weight.to(dtype), bias.to(dtype)).float()

    def _embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """timestep (B,) or (B, F) -> embedding (B, G, d) and the blocks' modulation (B, G, 6, d), float32."""
        each = timestep.unsqueeze(1) if timestep.ndim == 1 else timestep
        time = self.time_embedding(sinusoid(each, self.config.freq_dim))
        return time, self.time_projection(time).unflatten(-1, (6, -1))

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        frames, rows, columns = grid
        pt, ph, pw = self.config.patch_size
        return rearrange(
            patches,
            "B (F H W) (t h w C) -> B C (F t) (H h) (W w)",
            F=frames,
            H=rows,
            W=columns,
            t=pt,
            h=ph,
            w=pw,
        )


RunBlocks = Callable[[Embedded], None]


@contextmanager
def wrap_run_blocks(model: Dit, wrap: Callable[[RunBlocks], RunBlocks]) -> Iterator[None]:
    """While it lasts, let `wrap(run_blocks)` stand in for what the model has as `run_blocks`; wraps nest."""
    before: Any = vars(model).get("run_blocks")
    vars(model)["run_blocks"] = wrap(model.run_blocks)
    try:
        yield
    finally:
        if before is None:
            del vars(model)["run_blocks"]
        else:
            vars(model)["run_blocks"] = before


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, L, d) * (1 + scale) + shift with shift and scale (B, G, d), G groups of equally many tokens."""
    grouped = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift.unsqueeze(2), grouped, 1 + scale.unsqueeze(2)).flatten(1, 2)


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + update * gate, gate (B, G, d); float32."""
    groups = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, groups), update.unflatten(1, groups).float(), gate.unsqueeze(2)).flatten(1, 2)


def sinusoid(timestep: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of t * 10000^(-i / half), i below half = width/2: (..., width), taken in float64."""
    half = width // 2
    device = float64_device(timestep.device)
    rates = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=device) / half)
    angles = timestep.to(device).to(torch.float64).unsqueeze(-1) * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float().to(timestep.device)


def pad_context(context: list[Tensor] | Tensor, config: DitConfig, device: torch.device) -> Tensor:
    """Embeddings of texts of different length as one (B, 512, text_dim), zeros behind each text."""
    if isinstance(context, Tensor):
        return context.to(device)
    longest = max(len(rows) for rows in context)
    if longest > TEXT_LENGTH:
        raise ValueError(f"a text embedding has {longest} rows, the model takes at most {TEXT_LENGTH}")
    padded = torch.zeros(len(context), TEXT_LENGTH, config.text_dim, device=device, dtype=context[0].dtype)
    for row, text in zip(padded, context, strict=True):
        row[: len(text)] = text
    return padded


def refuse_inputs(**inputs: Tensor | None) -> None:
    """ValueError for an input that the model has no weights for."""
    for name, value in inputs.items():
        if value is not None:
            raise ValueError(f"this model has no weights for {name}")
