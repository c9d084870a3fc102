"""From a checkpoint to a DiT."""

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

    `config` overrides what cannot be read off the tensors (`num_heads`, `eps`); default: a `config.json` beside the
    file or the file's metadata is asked, and then num_heads = dim/128. `dtype` None keeps the file's. The weights need
    no gradient. Raises InputError when the file is not a DiT or a tensor is missing, unexpected or misshapen.

    The model: `model(latents (B,C,F,H,W), timestep (B,) or (B,F) in 0..1000, context)` -> velocity (B,C,F,H,W) float32,
    `context` a list of (L_i, text_dim) or (B, 512, text_dim). Its parameters bear the official names and shapes.
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
    """Where weights go and what they are kept in.

    `dtype` None keeps the file's; tensors that `on_host` names stay in CPU RAM, which something else brings to the
    device when they are needed. With `sharding` the blocks' matrices are split over processes.
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
    """`load_dit` for a stream of tensors under official names that something else may have changed on the way.

    The modules of `plan` arrive as codes, with a scale behind those that have one.
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


def outline_dit(source: TensorSource, *, dtype: torch.dtype | None = None, header: Header | None = None) -> Dit:
    """The model of a checkpoint without its numbers: on the meta device, each tensor in the dtype that it will have.

    `header` stands for that of the file where tensors are added to it.
    """
    header = header or read_header(source)
    shapes = official_shapes(header.shapes)
    model = _empty(shapes, source, header.metadata, None, describe(source))
    rename = dit_rename(header.shapes)
    kept = dtypes_kept({rename(name): stored for name, stored in header.dtypes.items()}, dtype, set())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(kept(name, parameter))
    stored = dtype or storage_dtype(header)
    model.compute_dtype = torch.bfloat16 if stored.itemsize == 1 else stored
    return model


def check_dit(
    source: TensorSource, variant: Variant, *, flag: str = "--dit", header: Header | None = None
) -> str | None:
    """Refuse a file that cannot serve a task, from its header alone; a warning when it can but is of another size.

    `header` stands for that of the file where tensors are added to it. Raises InputError when the file is not a DiT, of
    another kind than the task's, or does not fit by name or shape.
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
            f"{label} is {found.dim} wide with {found.num_layers} blocks; {variant.name} as published is "
            f"{variant.dim} wide with {variant.num_layers}: continuing with the file's own size"
        )
    return None


def num_blocks(source: TensorSource) -> int:
    """How many blocks a DiT checkpoint has, from its header."""
    return _count_blocks(official_shapes(read_header(source).shapes))


def image_width(shapes: Shapes) -> int:
    """How wide the CLIP tokens are that a DiT with these `shapes`, official names, reads; 0 where it reads none."""
    return shapes.get("img_emb.proj.0.weight", (0,))[0]


def set_attention(
    model: Dit, name: str, *, device: torch.device | str, training: bool = False, split: bool = False
) -> None:
    """Let every block attend by the named backend on `device`, one sample at a time if `split`; see `attention`."""
    width = model.config.dim // model.config.num_heads
    dtype = model.compute_dtype
    attend = attention(name, device=device, dtype=dtype, training=training, split=split, head_width=width)
    for block in all_blocks(model):
        block.self_attn.attend = block.cross_attn.attend = attend  # type: ignore[union-attr]


def linear_shapes(source: TensorSource) -> dict[str, tuple[int, ...]]:
    """The shapes of what a LoRA can change in a checkpoint by official module name, from its header: `linears_of`."""
    return linears_of(official_shapes(read_header(source).shapes))


def linears_of(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes (out, in) of the matrices and (out, in, k, k) of the weights of Conv2d layers by module name, from the
    shapes of all weights by official name."""
    found = {name: tuple(shape) for name, shape in shapes.items() if name.endswith(".weight") and len(shape) in (2, 4)}
    return {name.removesuffix(".weight"): shape for name, shape in found.items()}


def describe(source: TensorSource) -> str:
    """How to name a source in a message."""
    return "the state dict" if isinstance(source, Mapping) else str(source)


def official_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes of a DiT checkpoint's weights under official names."""
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
        raise InputError(f"{label} is not a whole Wan DiT: no usable {problem}") from None
    num_layers = _count_blocks(shapes)
    vace = shapes.get("vace_patch_embedding.weight", (0, 0))
    num_heads = int(extras.get("num_heads") or max(1, dim // HEAD_WIDTH))
    if dim % num_heads or (dim // num_heads) % 2:
        raise InputError(f"{label}: a width of {dim} does not divide into {num_heads} heads of even width")
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
    """What is said of the model beside its tensors: the caller's word, then config.json, then the file's metadata."""
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
        raise InputError(f"{path} is not JSON ({problem}): repair it or move it away") from None
    if not isinstance(found, dict):
        return {}
    heads, width = found.get("num_attention_heads"), found.get("attention_head_dim")
    its_dim = found.get("dim") or (heads * width if heads and width else dim)
    if its_dim != dim:  # the configuration of another model in the same folder
        return {}
    names = {"num_heads": "num_heads", "num_attention_heads": "num_heads", "eps": "eps"}
    return {ours: found[theirs] for theirs, ours in names.items() if found.get(theirs) is not None}
