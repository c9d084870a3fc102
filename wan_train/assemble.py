"""The one ordered list of what is done to a DiT: read, rename, merge, fill, attach, recompute."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from networks.adapter import Adapter, create
from networks.formats import read_lora
from networks.merge import merged
from networks.settings import NetworkSettings
from wan_train.memory.recompute import apply_recompute
from wan_train.models.dit import Dit
from wan_train.models.loading import build_dit, linear_shapes
from wan_train.models.settings import DitSettings
from wan_train.models.weights import dit_rename, renamed
from wan_train.storage import read_header, read_tensors


@dataclass(frozen=True)
class WeightedLora:
    """A LoRA file to merge, and how strongly."""

    path: str
    multiplier: float = 1.0


def assemble_dit(
    settings: DitSettings,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    loras: Sequence[WeightedLora] = (),
) -> Dit:
    """The DiT with LoRA files merged into its weights in float32 while they stream in. `dtype` None: the file's."""
    header = read_header(settings.dit)
    names = linear_shapes(settings.dit) if loras else {}
    deltas = [(read_lora(lora.path, names), lora.multiplier) for lora in loras]
    tensors = renamed(read_tensors(settings.dit), dit_rename(header.shapes))
    stream = merged(tensors, deltas) if deltas else tensors
    return build_dit(header, stream, source=settings.dit, device=device, dtype=dtype, attn_mode=settings.attn_mode)


def attach_adapter(model: Dit, network: NetworkSettings, *, seed: int, recompute: str) -> Adapter:
    """Make the model trainable through an adapter, its blocks recomputed in the backward pass as `recompute` says."""
    adapter = create(model, network, seed=seed)
    apply_recompute(model.blocks, recompute)
    return adapter
