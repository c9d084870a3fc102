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
from einops import rearrange
from torch import Tensor, nn

from wan_train.models.dit.block import Block, Head
from wan_train.models.dit.control import CameraAdapter, MotionController, embed_reference
from wan_train.models.dit.embedding import embed_patches, pad_context, sinusoid
from wan_train.models.dit.inputs import NO_INPUTS, Inputs, check_inputs
from wan_train.models.dit.layers import GELU, ImageEmbedding
from wan_train.models.dit.layers import DitConfig as DitConfig
from wan_train.models.dit.rope import Riflex, rope_table
from wan_train.models.dit.vace import VaceState, add_hint, make_vace_blocks
from wan_train.precision import Conv2d, Linear

NUM_CLIP_TOKENS = 257  # of an image


@dataclass(frozen=True)
class EmbeddedContext:
    """What `Dit.embed_context` made: `tokens` (B, T, d), for as many passes as see the same context."""

    tokens: Tensor


@dataclass
class Embedded:
    """What `Dit.begin` made of the inputs, all that the blocks and the head need.

    `tokens` (B, L, d) float32, which the blocks replace: they are large, and nothing else may hold them. `context`
    (B, T, d), `time` (B, G, d) and `modulation` (B, G, 6, d) float32 for G groups of equally many tokens, `rope`
    (2, L, 1, D), `grid` the numbers of patches (F, H, W) of the latents; `num_before` tokens of a reference image stand
    before those. `skipped` are the indices of `blocks` that this pass leaves out, `vace` is the other stack's state.
    """

    tokens: Tensor
    context: Tensor
    time: Tensor
    modulation: Tensor
    rope: Tensor
    grid: tuple[int, int, int]
    num_before: int = 0
    vace: VaceState | None = None
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
        if config.reference:
            self.ref_conv = Conv2d(config.out_dim, dim, config.patch_size[1:], stride=config.patch_size[1:])
        if config.camera_dim:
            self.control_adapter = CameraAdapter(config.camera_dim, dim)
        if config.vace_layers:
            self.vace_patch_embedding = nn.Conv3d(config.vace_dim, dim, config.patch_size, stride=config.patch_size)
            self.vace_blocks = make_vace_blocks(config)
        if config.motion:
            self.motion_controller = MotionController(config.freq_dim, dim)

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
        riflex: Riflex | None = None,
    ) -> Tensor:
        """Velocity (B, C, F, H, W) in float32 of noisy `latents` (B, C, F, H, W).

        `timestep` (B,) or (B, F) in 0..1000; `context` a list of (L_i, text_dim) or (B, 512, text_dim), or what
        `embed_context` made of that and of `clip_features`; `frame_positions` (F,) where each latent frame is in time,
        else 0..F-1; `riflex` lowers a temporal frequency of long videos. Models for images read `image_latents`
        (B, in_dim - C, F, H, W), whatever is concatenated behind the noisy ones, and those of Wan2.1 `clip_features`
        (B, I, image_dim).

        Control models read `reference_latents` (B, C, 1, H, W) of an image, `camera` (B, 24, F, 8H, 8W), a packed
        Pluecker map, `vace_context` (B, 96, F, H, W), whose hints are added `vace_scale` times, or `motion_bucket_id`
        (B,) in 0..100. Where they are absent, zeros stand for a reference and for a control model's CLIP tokens, and
        VACE and the motion controller add nothing. Inputs that the model has no weights for are a ValueError, and so
        are other missing ones.
        """
        inputs = Inputs(
            image_latents,
            clip_features,
            reference_latents,
            camera,
            vace_context,
            vace_scale,
            motion_bucket_id,
            frame_positions,
            riflex,
        )
        check_inputs(inputs, self.config, latents.shape[1])
        state = self.begin(latents, timestep, context, inputs)
        self.run_blocks(state)
        return self.finish(state)

    def begin(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: list[Tensor] | Tensor | EmbeddedContext,
        inputs: Inputs = NO_INPUTS,
    ) -> Embedded:
        """Embed the inputs of `forward`, which has checked them."""
        if not isinstance(context, EmbeddedContext):
            context = self.embed_context(context, inputs.clip_features, device=latents.device)
        time, modulation = self.embed_time(timestep)
        if inputs.motion_bucket_id is not None:
            modulation = modulation + self.motion_controller(inputs.motion_bucket_id.to(latents.device))
        if inputs.image_latents is not None:
            latents = torch.cat([latents, inputs.image_latents.to(latents)], dim=1)
        grid = self._grid(latents)
        tokens = embed_patches(self.patch_embedding, latents, self.compute_dtype)
        if inputs.camera is not None:
            tokens = tokens + self.control_adapter(inputs.camera.to(latents.device), self.compute_dtype)
        before = self._embed_reference(inputs.reference_latents, latents)
        tokens = tokens if before is None else torch.cat([before, tokens], dim=1)
        return Embedded(
            tokens=tokens,
            context=context.tokens,
            time=time,
            modulation=modulation,
            rope=self._rope(grid, inputs, latents.device, later=before is not None),
            grid=grid,
            num_before=0 if before is None else before.shape[1],
            vace=self._begin_vace(inputs, latents.device),
        )

    def run_blocks(self, state: Embedded) -> None:
        """Send the tokens of a pass through all blocks but the skipped ones; a skipped block's hint is left out too."""
        numbers = {layer: number for number, layer in enumerate(self.config.vace_layers)} if state.vace else {}
        for index, block in enumerate(self.blocks):
            hint = self._next_hint(state, numbers[index]) if index in numbers else None
            if index in state.skipped:
                continue
            state.tokens = block(state.tokens, state.context, state.modulation, state.rope)
            if hint is not None and state.vace is not None:
                state.tokens = add_hint(state.tokens, hint, state.vace.scale)

    def finish(self, state: Embedded) -> Tensor:
        """The velocity (B, C, F, H, W) in float32 of the tokens of a pass."""
        return self._unpatchify(self.head(state.tokens[:, state.num_before :], state.time), state.grid)

    def embed_context(
        self, context: list[Tensor] | Tensor, clip_features: Tensor | None = None, *, device: torch.device
    ) -> EmbeddedContext:
        """Texts and the images' tokens at the model's width: what every step of a sampling run has in common.

        ValueError where the model needs `clip_features` and has none, or the other way round.
        """
        text: Tensor = self.text_embedding(pad_context(context, self.config, device).to(self.compute_dtype))
        if clip_features is None and self.config.allows_missing_clip:
            clip_features = text.new_zeros(len(text), NUM_CLIP_TOKENS, self.config.image_dim)
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

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding (B, G, d) and the blocks' modulation (B, G, 6, d) of timesteps (B,) or (B, F)."""
        each = timestep.unsqueeze(1) if timestep.ndim == 1 else timestep
        time = self.time_embedding(sinusoid(each, self.config.freq_dim))
        return time, self.time_projection(time).unflatten(-1, (6, -1))

    def _embed_reference(self, reference: Tensor | None, latents: Tensor) -> Tensor | None:
        """Tokens (B, P, d) of the reference (B, C, 1, H, W), of zeros without one; None where the model has none."""
        if not self.config.reference:
            return None
        if reference is None:
            reference = latents.new_zeros(len(latents), self.config.out_dim, 1, *latents.shape[3:])
        return embed_reference(self.ref_conv, reference.to(latents.device), self.compute_dtype)

    def _rope(self, grid: tuple[int, int, int], inputs: Inputs, device: torch.device, *, later: bool) -> Tensor:
        """The rope table of the grid; `later` by one frame, in which a reference stands."""
        frames = inputs.frame_positions
        if later:
            assert frames is None, "models with a reference have their frames one after the other"
            grid = (grid[0] + 1, *grid[1:])
        head_dim = self.config.dim // self.config.num_heads
        return rope_table(grid, head_dim, device=device, frames=frames, riflex=inputs.riflex)

    def _begin_vace(self, inputs: Inputs, device: torch.device) -> VaceState | None:
        if inputs.vace_context is None or inputs.vace_scale == 0:
            return None
        context = inputs.vace_context.to(device)
        return VaceState(embed_patches(self.vace_patch_embedding, context, self.compute_dtype), inputs.vace_scale)

    def _next_hint(self, state: Embedded, number: int) -> Tensor:
        """The hint of a VACE block, the next one; of the first the base's tokens are an input."""
        assert state.vace is not None
        start = (state.tokens,) if number == 0 else ()
        tokens, hint = self.vace_blocks[number](state.vace.tokens, state.context, state.modulation, state.rope, *start)
        state.vace.tokens = tokens
        return hint

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
