"""The CLIP image encoder of Wan2.1's I2V models: transformers' layers, loaded from checkpoints with any naming.

B images, H W pixels, P patches; the published encoder (ViT-H/14) has width 1280, 32 blocks, 16 heads and 256 patches.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from statistics import mode
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from wan_train.errors import InputError
from wan_train.models.weights import Pairs, Shapes, check_names, fill, require_kind, strip_prefix
from wan_train.precision import compute_dtype, upcast_on_use
from wan_train.storage import TensorSource, read_header, read_tensors

HEAD_WIDTH = 80  # of ViT-H/14: width 1280, 16 heads
# Image statistics of CLIP's preprocessing.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Official, without its prefix -> ours, outside and inside a block.
_OUTER = {
    "cls_embedding": "embeddings.class_embedding",
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "pos_embedding": "embeddings.position_embedding.weight",
    "pre_norm.weight": "pre_layrnorm.weight",
    "pre_norm.bias": "pre_layrnorm.bias",
}
_INNER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_JOINED = "attn.to_qkv"  # q, k and v, concatenated
_SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_PREFIXES = ("visual.", "vision_model.")
# The text encoder, and the layers after the last block.
_UNUSED = (
    *("textual.", "text_model.", "text_projection.", "log_scale", "logit_scale"),
    *("post_norm.", "post_layernorm.", "head", "visual_projection.", "embeddings.position_ids"),
)


class ImageEncoder(nn.Module):
    """Encode images into tokens; create one with `load_image_encoder`."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        whole = CLIPVisionModel(config)
        tower = getattr(whole, "vision_model", whole)  # some versions of transformers have an additional level
        self.image_size: int = config.image_size
        self.dtype = torch.float32
        self.embeddings = tower.embeddings
        self.pre_layrnorm = tower.pre_layrnorm
        self.layers = tower.encoder.layers

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return tokens (B, 1+P, width) before the last block, class token first, of pixels (B, 3, H, W) in [-1, 1].

        Images of any size are resized bicubically to the encoder's input size, ignoring the aspect ratio, as in the
        official code.
        """
        device = self.embeddings.class_embedding.device
        x: Tensor = self.pre_layrnorm(self.embeddings(self._prepared(pixels.to(device)).to(self.dtype)))
        for layer in self.layers:
            x = layer(x, None)
        return x

    def _prepared(self, pixels: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        small = F.interpolate(pixels.float(), size=size, mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
        return (small * 0.5 + 0.5 - mean) / std


def load_image_encoder(
    source: TensorSource,
    *,
    config: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> ImageEncoder:
    """Load the CLIP image encoder, frozen.

    `source`: a .pth, a safetensors file or a state dict, with official names (with or without `visual.`) or those of
    transformers and ComfyUI. Sizes are inferred from the tensors; heads have width 80 unless `config` gives
    `num_heads`. Weights are stored in `dtype` (None: as in the file); on a CPU they are computed with in float32.
    Raises InputError if the file is not an image encoder, or a tensor is missing or misshapen.

    Call the encoder with pixels (B, 3, H, W) in [-1, 1] -> tokens (B, 1+P, width) before the last block, P patches.
    """
    header, label = read_header(source), _describe(source)
    encoder = _make_empty(header.shapes, config or {}, label)
    fill(encoder, _tower(read_tensors(source), header.shapes), device=device, dtype=dtype, label=label)
    embeddings = encoder.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=device).expand(1, -1)
    stored = dtype or mode(header.dtypes[name] for name in header.shapes if _is_used(name))
    encoder.dtype = compute_dtype(device, stored)
    upcast_on_use(encoder, encoder.dtype)
    return encoder.eval()


def check_image_encoder(source: TensorSource, flag: str = "--clip") -> int:
    """Return the token width of a file's encoder, from its header.

    Raises InputError if `load_image_encoder` would refuse the file.
    """
    label = flag if isinstance(source, Mapping) else f"{flag} {os.fspath(source)}"
    header = read_header(source)
    encoder = _make_empty(header.shapes, {}, label)
    for name, dtype in header.dtypes.items():
        if _is_used(name) and not (dtype.is_floating_point and dtype.itemsize > 1):
            raise InputError(f"{label} stores {name} as 8-bit floats or integers: give a bf16, fp16 or fp32 file")
    return int(encoder.embeddings.class_embedding.shape[0])


def _make_empty(found: Shapes, config: Mapping[str, Any], label: str) -> ImageEncoder:
    """Return the encoder on the meta device whose weights match these tensors."""
    require_kind(found, "CLIP", label)
    meta = ((name, torch.empty(shape, device="meta")) for name, shape in found.items())
    shapes = {name: tuple(tensor.shape) for name, tensor in _tower(meta, found)}
    with torch.device("meta"):
        encoder = ImageEncoder(_read_config(shapes, config, label))
    check_names(shapes, encoder, label)
    return encoder


def _read_config(shapes: Shapes, config: Mapping[str, Any], label: str) -> CLIPVisionConfig:
    try:
        width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
        num_positions = shapes["embeddings.position_embedding.weight"][0]
    except (KeyError, ValueError) as problem:
        raise InputError(f"{label} is not a complete CLIP image encoder: missing or invalid {problem}") from None
    num_heads = int(config.get("num_heads") or max(1, width // HEAD_WIDTH))
    if width % num_heads:
        raise InputError(f"{label}: width {width} is not divisible by {num_heads} heads")
    blocks = {name.split(".")[1] for name in shapes if name.startswith("layers.")}
    inner = [shape[0] for name, shape in shapes.items() if name.endswith("mlp.fc1.weight")]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=mode(inner) if inner else 4 * width,
        num_hidden_layers=len(blocks),
        num_attention_heads=num_heads,
        image_size=patch * math.isqrt(num_positions - 1),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )


def _tower(tensors: Pairs, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the file's tensors with transformers' names, without those after the output; `names` are the file's."""
    numbers = [int(number) for name in names if (number := _block_number(_bare(name))) is not None]
    last = max(numbers, default=-1)
    for name, tensor in tensors:
        if _is_used(name) and _block_number(bare := _bare(name)) != last:
            yield from _ours(bare, tensor)


def _ours(bare: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor of either naming with transformers' names; queries, keys and values are split."""
    if bare in _OUTER:
        # Official files store the class token as (1, 1, width) and the positions as (1, 1+P, width).
        yield _OUTER[bare], tensor.view(tensor.shape[-1]) if bare == "cls_embedding" else _without_one(tensor)
        return
    prefix, _, rest = bare.partition(".")
    number, _, inner = rest.partition(".")
    if prefix != "transformer":
        yield bare.removeprefix("encoder."), tensor
        return
    part, _, leaf = inner.rpartition(".")
    if part == _JOINED:
        for name, piece in zip(_SPLIT, tensor.chunk(3), strict=True):
            yield f"layers.{number}.{name}.{leaf}", piece
    else:
        yield f"layers.{number}.{_INNER.get(part, part)}.{leaf}", tensor


def _without_one(tensor: Tensor) -> Tensor:
    return tensor[0] if tensor.ndim == 3 else tensor


def _bare(name: str) -> str:
    return strip_prefix(name, _PREFIXES)


def _is_used(name: str) -> bool:
    return not _bare(name).startswith(_UNUSED)


def _block_number(bare: str) -> int | None:
    """Return the index of the block that a tensor belongs to, in either naming."""
    parts = bare.removeprefix("encoder.").split(".")
    return int(parts[1]) if parts[0] in ("transformer", "layers") and parts[1].isdecimal() else None


def _describe(source: TensorSource) -> str:
    return "the image encoder's state dict" if isinstance(source, Mapping) else os.fspath(source)
