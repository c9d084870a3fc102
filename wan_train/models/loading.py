"""Load a DiT from a checkpoint."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_train.errors import InputError
from wan_train.models.dit.attention import attention
from wan_train.models.dit.control import CAMERA_SHRINK
from wan_train.models.dit.dit import Dit, DitConfig
from wan_train.models.dit.kinds import refuse_foreign, require_task
from wan_train.models.stacks import BASE, VACE, all_blocks, hinted_layers, read_block_name
from wan_train.models.variants import Variant
from wan_train.models.weights import Shapes, check_names, dit_rename, fill, renamed, require_kind
from wan_train.placement.sharding import Sharding
from wan_train.precision import compute_dtype
from wan_train.quantization.stored import (
    NOTHING_QUANTISED,
    StoragePlan,
    dtypes_kept,
    install_plan,
    is_auxiliary,
    read_scales,
    storage_dtype,
    unscaled,
)
from wan_train.storage import Header, TensorSource, read_header, read_tensors

HEAD_WIDTH = 128  # of every published Wan model


def load_dit(
    source: TensorSource,
    *,
    config: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attn_mode: str = "torch",
) -> Dit:
    """Load a DiT from a path (a file, a shard, a folder of shards, a `.pth`) or a state dict of any known naming.

    `config` overrides values that are not stored in the tensors (`num_heads`, `eps`); default: `config.json` next to
    the file, then the file's metadata, then num_heads = dim/128. `dtype` None keeps the file's dtype. The weights do
    not require gradients. Raises InputError if the file is not a DiT, or if a tensor is missing, unexpected or has the
    wrong shape.

    Call the model as `model(latents (B,C,F,H,W), timestep (B,) or (B,F) in 0..1000, context)` -> velocity (B,C,F,H,W)
    float32, with `context` a list of (L_i, text_dim) or (B, 512, text_dim). Parameters have the official names and
    shapes.
    """
    header = read_header(source)
    rename = dit_rename(header.shapes)
    scales = read_scales(source, header, rename, official_shapes(header.shapes))
    tensors = unscaled(renamed(read_tensors(source), rename), scales, kept=())
    model = build_dit(header, tensors, source=source, config=config, placement=Placement(torch.device(device), dtype))
    set_attention(model, attn_mode, device=device)
    return model


@dataclass(frozen=True)
class Placement:
    """Device and dtype of the weights.

    `dtype` None keeps the file's dtype. Tensors for which `on_host` is true stay in CPU RAM and are streamed to the
    device on demand. With `sharding` the blocks' matrices are sharded over processes.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    on_host: Callable[[str], bool] = lambda name: False
    sharding: Sharding | None = None


def build_dit(
    header: Header,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: TensorSource,
    placement: Placement,
    config: Mapping[str, Any] | None = None,
    plan: StoragePlan = NOTHING_QUANTISED,
) -> Dit:
    """Build a DiT like `load_dit`, from a stream of tensors (official names) that may have been changed on the way.

    Modules in `plan` arrive as quantised weights, each followed by its scale if it has one.
    """
    label = describe(source)
    shapes = official_shapes(header.shapes)
    model = _empty(shapes, source, header.metadata, config, label)
    install_plan(model, plan, shapes)
    if placement.sharding is not None:
        placement.sharding.split(model, all_blocks(model))
    rename = dit_rename(header.shapes)
    dtypes = {rename(name): dtype for name, dtype in header.dtypes.items()}
    host = torch.device("cpu")
    fill(
        model,
        tensors,
        device=lambda name: host if placement.on_host(name) else placement.device,
        dtype=dtypes_kept(dtypes, placement.dtype, plan.codes()),
        label=label,
    )
    stored = placement.dtype or storage_dtype(header)
    model.compute_dtype = compute_dtype(placement.device, torch.bfloat16 if stored.itemsize == 1 else stored)
    return model


def outline_dit(
    source: TensorSource,
    *,
    dtype: torch.dtype | None = None,
    header: Header | None = None,
    plan: StoragePlan = NOTHING_QUANTISED,
) -> Dit:
    """Return the model of a checkpoint without data: on the meta device, with the final dtype of each tensor.

    `header` replaces the file's header if tensors are added to the file. Modules in `plan` are quantised.
    """
    header = header or read_header(source)
    shapes = official_shapes(header.shapes)
    model = _empty(shapes, source, header.metadata, None, describe(source))
    install_plan(model, plan, shapes)
    rename = dit_rename(header.shapes)
    stored_dtypes = {rename(name): stored for name, stored in header.dtypes.items()}
    kept, codes = dtypes_kept(stored_dtypes, dtype, set()), plan.code_dtypes(stored_dtypes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(codes.get(name) or kept(name, parameter))
    stored = dtype or storage_dtype(header)
    model.compute_dtype = torch.bfloat16 if stored.itemsize == 1 else stored
    return model


def check_dit(
    source: TensorSource, variant: Variant, *, flag: str = "--dit", header: Header | None = None
) -> str | None:
    """Check by its header that a file fits a task; return a warning if it fits but is not of the published size.

    `header` replaces the file's header if tensors are added to the file. Raises InputError if the file is not a DiT, is
    for a different kind of task, or has missing or misshapen tensors.
    """
    header = header or read_header(source)
    label = f"{flag} {describe(source)}"
    require_kind(header.shapes, "DiT", label)
    shapes = official_shapes(header.shapes)
    refuse_foreign(shapes, label)
    require_task(shapes, variant, label)
    found = _empty(shapes, source, header.metadata, None, label).config
    if (found.dim, found.num_layers) != (variant.dim, variant.num_layers):
        return (
            f"{label} has width {found.dim} and {found.num_layers} blocks, but the published {variant.name} has width "
            f"{variant.dim} and {variant.num_layers} blocks: continuing with the file's size"
        )
    return None


def num_blocks(source: TensorSource) -> int:
    """Return the number of blocks of a DiT checkpoint, from its header."""
    return _count_blocks(official_shapes(read_header(source).shapes))


def image_width(shapes: Shapes) -> int:
    """Return the width of the CLIP tokens of a DiT with `shapes` (official names); 0 if it takes none."""
    return shapes.get("img_emb.proj.0.weight", (0,))[0]


def set_attention(
    model: Dit, name: str, *, device: torch.device | str, training: bool = False, split: bool = False
) -> None:
    """Set the attention backend of every block on `device`, one sample at a time if `split`; see `attention`."""
    width = model.config.dim // model.config.num_heads
    dtype = model.compute_dtype
    attend = attention(name, device=device, dtype=dtype, training=training, split=split, head_width=width)
    for block in all_blocks(model):
        block.self_attn.attend = block.cross_attn.attend = attend  # type: ignore[union-attr]


def linear_shapes(source: TensorSource) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the layers of a checkpoint that a LoRA can adapt, from its header; see `linears_of`."""
    return linears_of(official_shapes(read_header(source).shapes))


def linears_of(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return weight shapes by module name: (out, in) of matrices and (out, in, k, k) of Conv2d layers.

    `shapes` are those of all weights by official name.
    """
    found = {name: tuple(shape) for name, shape in shapes.items() if name.endswith(".weight") and len(shape) in (2, 4)}
    return {name.removesuffix(".weight"): shape for name, shape in found.items()}


def describe(source: TensorSource) -> str:
    """Return the name of a source for messages."""
    return "the state dict" if isinstance(source, Mapping) else str(source)


def official_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a DiT checkpoint's weights by official name."""
    rename = dit_rename(shapes)
    return {rename(name): tuple(shape) for name, shape in shapes.items() if not is_auxiliary(name)}


def _empty(
    shapes: Shapes, source: TensorSource, metadata: Mapping[str, str], config: Mapping[str, Any] | None, label: str
) -> Dit:
    require_kind(shapes, "DiT", label)
    refuse_foreign(shapes, label)
    dim = shapes.get("patch_embedding.weight", (0,))[0]
    with torch.device("meta"):
        model = Dit(_geometry(shapes, _extras(source, metadata, config, dim), label))
    check_names(shapes, model, label)
    return model


def _geometry(shapes: Shapes, extras: Mapping[str, Any], label: str) -> DitConfig:
    try:
        dim, in_dim, *patch = shapes["patch_embedding.weight"]
        text_dim = shapes["text_embedding.0.weight"][1]
        freq_dim = shapes["time_embedding.0.weight"][1]
        ffn_dim = shapes["blocks.0.ffn.0.weight"][0]
        out = shapes["head.head.weight"][0]
    except (KeyError, IndexError, ValueError) as problem:
        raise InputError(f"{label} is not a complete Wan DiT: missing or invalid {problem}") from None
    num_layers = _count_blocks(shapes)
    vace = shapes.get("vace_patch_embedding.weight", (0, 0))
    num_heads = int(extras.get("num_heads") or max(1, dim // HEAD_WIDTH))
    if dim % num_heads or (dim // num_heads) % 2:
        raise InputError(f"{label}: width {dim} cannot be split into {num_heads} heads of even width")
    patch_size = (patch[0], patch[1], patch[2])
    return DitConfig(
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=num_heads,
        num_layers=num_layers,
        in_dim=in_dim,
        out_dim=out // (patch[0] * patch[1] * patch[2]),
        text_dim=text_dim,
        image_dim=shapes.get("img_emb.proj.0.weight", (0,))[0],
        image_positions=shapes.get("img_emb.emb_pos", (0, 0, 0))[1],
        freq_dim=freq_dim,
        patch_size=patch_size,
        eps=float(extras.get("eps", 1e-6)),
        reference="ref_conv.weight" in shapes,
        camera_dim=shapes.get("control_adapter.conv.weight", (0, 0))[1] // CAMERA_SHRINK**2,
        vace_dim=vace[1],
        vace_layers=hinted_layers(num_layers, _count_blocks(shapes, VACE)) if vace[1] else (),
        motion="motion_controller.linear.0.weight" in shapes,
    )


def _count_blocks(shapes: Shapes, stack: str = BASE) -> int:
    parts = [part for part in map(read_block_name, shapes) if part is not None and part.stack == stack]
    return len({part.index for part in parts})


def _extras(
    source: TensorSource, metadata: Mapping[str, str], config: Mapping[str, Any] | None, dim: int
) -> dict[str, Any]:
    """Return values not stored in the tensors: from `config`, else config.json, else the file's metadata."""
    known: dict[str, Any] = {}
    if "num_heads" in metadata:
        known["num_heads"] = metadata["num_heads"]
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        beside = (path if path.is_dir() else path.parent) / "config.json"
        if beside.is_file():
            known |= _read_config(beside, dim)
    given = dict(config or {})
    if "num_attention_heads" in given:
        given["num_heads"] = given.pop("num_attention_heads")
    return known | given


def _read_config(path: Path, dim: int) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as problem:
        raise InputError(f"{path} is not valid JSON ({problem}): fix it or move it elsewhere") from None
    if not isinstance(found, dict):
        return {}
    heads, width = found.get("num_attention_heads"), found.get("attention_head_dim")
    its_dim = found.get("dim") or (heads * width if heads and width else dim)
    if its_dim != dim:  # config.json of a different model in the same folder
        return {}
    names = {"num_heads": "num_heads", "num_attention_heads": "num_heads", "eps": "eps"}
    return {ours: found[theirs] for theirs, ours in names.items() if found.get(theirs) is not None}
