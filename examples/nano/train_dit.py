"""Train the DiT of the small model: the project's own model, path and noise levels in a minimal loop.

Captions are short and the model reads 512 rows of text, of which all but a dozen are the same padding. One row in place
of n equal ones, with log n added to its attention score, gives the same result with a fraction of the work.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.nano.state import Trail, load_state, save_state
from wan_train.flow.path import interpolate, velocity
from wan_train.flow.timesteps import shift
from wan_train.models.dit.dit import Dit, DitConfig
from wan_train.models.variants import TEXT_LENGTH

CONFIG = DitConfig(dim=192, ffn_dim=768, num_heads=4, num_layers=4, text_dim=64)
SHIFT = 3.0
NO_TEXT = 0.1  # share of samples that get the empty caption, for guidance
NO_CONTROL = 0.1  # share of samples that get zeros for their control


@dataclass(frozen=True)
class DitSettings:
    """Duration and speed of the training; `minutes` of wall-clock time."""

    minutes: float = 45.0
    rate: float = 1.5e-3
    batch: int = 64


@dataclass(frozen=True)
class Samples:
    """The training data: latents (N, 16, 5, 4, 4), the caption index of each, and the captions' embeddings.

    `context` (captions, T, text_dim) is zero-padded after each caption, `lengths` (captions,); the last caption is
    empty. `controls` (N, 16, 5, 4, 4) are the latents of each clip's control video, for a model that reads one.
    """

    latents: Tensor
    captions: Tensor
    context: Tensor
    lengths: Tensor
    controls: Tensor | None = None


def pad_captions(embeddings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return embeddings (L_i, text_dim) as (captions, T, text_dim) with at least one row of zeros after each, and the
    L_i."""
    lengths = torch.tensor([len(rows) for rows in embeddings])
    padded = torch.zeros(len(embeddings), int(lengths.max()) + 1, embeddings[0].shape[1])
    for row, text in zip(padded, embeddings, strict=True):
        row[: len(text)] = text
    return padded, lengths


class ShortText:
    """Cross-attention to T rows instead of 512: the rows after `lengths` (B,) represent the padding."""

    def __init__(self, model: Dit) -> None:
        self.bias: Tensor | None = None
        for block in model.blocks:
            block.cross_attn.attend = self.attend  # type: ignore[union-attr]

    def begin(self, lengths: Tensor, rows: int) -> None:
        """Set the lengths of the next batch."""
        padding = torch.arange(rows) >= lengths[:, None]
        weight = torch.log((TEXT_LENGTH - lengths) / (rows - lengths))
        self.bias = torch.where(padding, weight[:, None], 0.0)[:, None, None]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias).transpose(1, 2)


def make_dit(seed: int = 0) -> Dit:
    """Return a DiT with the initial weights of the official code, but with gates that let blocks act from the start."""
    torch.manual_seed(seed)
    model = Dit(CONFIG)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    for part in (model.text_embedding, model.time_embedding):
        for layer in part:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
    for name, parameter in model.named_parameters():
        if name.endswith("modulation"):
            nn.init.normal_(parameter, std=CONFIG.dim**-0.5)
            with torch.no_grad():
                parameter[:, [2, 5][: parameter.shape[1] // 3]] += 1
    nn.init.zeros_(model.head.head.weight)
    return model


def train_dit(work: Path, samples: Samples, settings: DitSettings, trail: Trail, *, start: Dit | None = None) -> Dit:
    """Return the average of the trained weights, starting from `start` or a new model; resumes from the state in
    `work`."""
    model = make_dit() if start is None else start
    text = ShortText(model)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.99))
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step, spent = load_state(work / "dit.pt", model, optimizer, average)
    began, saved = time.monotonic() - spent, time.monotonic()
    while (share := (time.monotonic() - began) / (60 * settings.minutes)) < 1:
        for group in optimizer.param_groups:
            falling = 1.0 if share < 0.5 else math.cos(math.pi / 2 * (share - 0.5) / 0.5)
            group["lr"] = settings.rate * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * falling)
        loss = _loss(model, text, samples, torch.Generator().manual_seed(step), settings.batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.9993, step / (step + 50))
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                average[name].lerp_(tensor, 1 - decay)
        trail.note("dit", step, loss.item())
        if time.monotonic() - saved > 60:
            save_state(work / "dit.pt", model, optimizer, average, step=step, spent=time.monotonic() - began)
            saved = time.monotonic()
    save_state(work / "dit.pt", model, optimizer, average, step=step, spent=time.monotonic() - began)
    model.load_state_dict(average)
    return model.requires_grad_(False).eval()


def _loss(model: Dit, text: ShortText, samples: Samples, draw: torch.Generator, batch: int) -> Tensor:
    """Return the mean squared error of the velocity over a batch."""
    chosen = torch.randint(len(samples.latents), (batch,), generator=draw)
    data, captions = samples.latents[chosen], samples.captions[chosen]
    captions = torch.where(torch.rand(batch, generator=draw) < NO_TEXT, len(samples.lengths) - 1, captions)
    noise = torch.randn(data.shape, generator=draw)
    # Stratified: every batch has all noise levels.
    even = (torch.arange(batch) + torch.rand(batch, generator=draw)) / batch
    t = shift(torch.special.ndtri(even.clamp(1e-4, 1 - 1e-4)).sigmoid(), SHIFT)
    lengths, context = samples.lengths[captions], samples.context[captions]
    text.begin(lengths, context.shape[1])
    beside = {} if samples.controls is None else {"image_latents": _control(samples.controls[chosen], draw)}
    return F.mse_loss(model(interpolate(data, noise, t), 1000 * t, context, **beside), velocity(data, noise))


def _control(latents: Tensor, draw: torch.Generator) -> Tensor:
    """Return what a Fun-Control model reads beside noisy latents: (B, 32, F, H, W), the control's latents, zeros in
    some samples, then zeros for the missing start image."""
    kept = torch.rand(len(latents), generator=draw) >= NO_CONTROL
    return torch.cat([latents * kept.view(-1, 1, 1, 1, 1), torch.zeros_like(latents)], dim=1)
