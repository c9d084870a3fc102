"""The Wan diffusion transformer, equivalent to the official Wan2.1 code.

Legend: B batch, C channels, F latent frames, H W latent size, P patches of one frame, L = F*P tokens, T context tokens
(image tokens, then 512 of the text), I image tokens, N heads, D head width, d = N*D token width.

Precision: matrix products are computed in the dtype of the embedded text; norms, modulation, gates, residual sums, the
time embedding and the head in float32. Modulation is stored per sample or per latent frame, never per token: (B, G, 6,
d) with G = 1 or F.
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

NUM_CLIP_TOKENS = 257  # per image


@dataclass(frozen=True)
class EmbeddedContext:
    """Output of `Dit.embed_context`: `tokens` (B, T, d), reusable in all passes with the same context."""

    tokens: Tensor


@dataclass
class Embedded:
    """State of a forward pass after `Dit.begin`: the inputs of the blocks and the head.

    `tokens` (B, L, d) float32 are replaced by each block; no other reference may be held because they are large.
    `context` (B, T, d), `time` (B, G, d) and `modulation` (B, G, 6, d) float32 for G groups of equally many tokens,
    `rope` (2, L, 1, D), `grid` the numbers of patches (F, H, W) of the latents; `num_before` reference tokens precede
    those of the latents. `skipped` are indices of `blocks` to skip in this pass, and `vace` is the state of the VACE
    stack.
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
    """The complete transformer; see `load_dit` for how to call it.

    A forward pass is `begin`, `run_blocks`, `finish`. Features that shorten or distribute a pass wrap `run_blocks` with
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
        """Return the velocity (B, C, F, H, W) in float32 of noisy `latents` (B, C, F, H, W).

        `timestep` (B,) or (B, F) in 0..1000; `context` a list of (L_i, text_dim) or (B, 512, text_dim), or the result
        of `embed_context`, which includes `clip_features`; `frame_positions` (F,) the time position of each latent
        frame, default: 0..F-1; `riflex` lowers one temporal rope frequency for long videos. Image models take
        `image_latents` (B, in_dim - C, F, H, W), which are concatenated to the noisy latents, and those of Wan2.1 also
        `clip_features` (B, I, image_dim).

        Control models take `reference_latents` (B, C, 1, H, W) of an image, `camera` (B, 24, F, 8H, 8W), a packed
        Pluecker map, `vace_context` (B, 96, F, H, W), whose hints are scaled by `vace_scale`, or `motion_bucket_id`
        (B,) in 0..100. A missing reference, or missing CLIP tokens of a control model, are replaced by zeros; without
        their inputs VACE and the motion controller have no effect. Raises ValueError for inputs that the model has no
        weights for, and for other missing inputs.
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
        """Embed the inputs of `forward`, which has validated them."""
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
        """Run all blocks on the tokens, except skipped blocks and their VACE hints."""
        numbers = {layer: number for number, layer in enumerate(self.config.vace_layers)} if state.vace else {}
        for index, block in enumerate(self.blocks):
            hint = self._next_hint(state, numbers[index]) if index in numbers else None
            if index in state.skipped:
                continue
            state.tokens = block(state.tokens, state.context, state.modulation, state.rope)
            if hint is not None and state.vace is not None:
                state.tokens = add_hint(state.tokens, hint, state.vace.scale)

    def finish(self, state: Embedded) -> Tensor:
        """Return the velocity (B, C, F, H, W) in float32 of the tokens of a pass."""
        return self._unpatchify(self.head(state.tokens[:, state.num_before :], state.time), state.grid)

    def embed_context(
        self, context: list[Tensor] | Tensor, clip_features: Tensor | None = None, *, device: torch.device
    ) -> EmbeddedContext:
        """Project text and CLIP image tokens to the model's width; the result is shared by all steps of a sampling run.

        Raises ValueError if the model requires `clip_features` and they are missing, or does not accept them.
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
                f"expected {self.config.in_dim} channels of latents and image_latents together, got {channels}"
            )
        if any(n % p for n, p in zip(size, self.config.patch_size, strict=True)):
            raise ValueError(f"latent size {size} is not divisible by the patch size {list(self.config.patch_size)}")
        return tuple(n // p for n, p in zip(size, self.config.patch_size, strict=True))  # type: ignore[return-value]

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding (B, G, d) and the blocks' modulation (B, G, 6, d) of timesteps (B,) or (B, F)."""
        each = timestep.unsqueeze(1) if timestep.ndim == 1 else timestep
        time = self.time_embedding(sinusoid(each, self.config.freq_dim))
        return time, self.time_projection(time).unflatten(-1, (6, -1))

    def _embed_reference(self, reference: Tensor | None, latents: Tensor) -> Tensor | None:
        """Return tokens (B, P, d) of the reference (B, C, 1, H, W), or of zeros if None; None without `ref_conv`."""
        if not self.config.reference:
            return None
        if reference is None:
            reference = latents.new_zeros(len(latents), self.config.out_dim, 1, *latents.shape[3:])
        return embed_reference(self.ref_conv, reference.to(latents.device), self.compute_dtype)

    def _rope(self, grid: tuple[int, int, int], inputs: Inputs, device: torch.device, *, later: bool) -> Tensor:
        """Return the rope table of the grid; with `later` the frames are shifted by one, after the reference."""
        frames = inputs.frame_positions
        if later:
            assert frames is None, "models with a reference require consecutive frames"
            grid = (grid[0] + 1, *grid[1:])
        head_dim = self.config.dim // self.config.num_heads
        return rope_table(grid, head_dim, device=device, frames=frames, riflex=inputs.riflex)

    def _begin_vace(self, inputs: Inputs, device: torch.device) -> VaceState | None:
        if inputs.vace_context is None or inputs.vace_scale == 0:
            return None
        context = inputs.vace_context.to(device)
        return VaceState(embed_patches(self.vace_patch_embedding, context, self.compute_dtype), inputs.vace_scale)

    def _next_hint(self, state: Embedded, number: int) -> Tensor:
        """Run the next VACE block and return its hint; the first block also takes the base's tokens."""
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
    """Replace the model's `run_blocks` by `wrap(run_blocks)` within the context; wraps can be nested."""
    before: Any = vars(model).get("run_blocks")
    vars(model)["run_blocks"] = wrap(model.run_blocks)
    try:
        yield
    finally:
        if before is None:
            del vars(model)["run_blocks"]
        else:
            vars(model)["run_blocks"] = before
