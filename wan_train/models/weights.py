"""Names of checkpoint tensors, and loading them into a model on the meta device."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from wan_train.errors import InputError
from wan_train.models.stacks import read_block_name
from wan_train.placement.sharding import keep_part

Shapes = Mapping[str, tuple[int, ...]]
Pairs = Iterable[tuple[str, Tensor]]
Rename = Callable[[str], str]

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.", "transformer.")

# A tensor name (after its prefix) that identifies a kind of checkpoint, most specific first.
_MARKERS: tuple[tuple[str, str], ...] = (
    ("lora_down.weight", "LoRA"),
    ("lora_A.weight", "LoRA"),
    ("head.modulation", "Wan DiT"),
    ("condition_embedder.time_embedder.linear_1.weight", "Wan DiT"),
    ("decoder.upsamples.0.upsamples.0.residual.2.weight", "Wan2.2 VAE"),
    ("decoder.upsamples.0.residual.2.weight", "Wan2.1 VAE"),
    ("decoder.up_blocks.0.resnets.0.conv1.weight", "Wan VAE (diffusers names)"),
    ("blocks.0.pos_embedding.embedding.weight", "UMT5 encoder"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "T5 encoder"),
    ("visual.patch_embedding.weight", "CLIP"),
    ("transformer.0.attn.to_qkv.weight", "CLIP"),
    ("embeddings.patch_embedding.weight", "CLIP"),
)


def identify(shapes: Shapes) -> str:
    """Return the kind of checkpoint with these names, in words, or 'unknown'."""
    names = set(shapes) | {strip_prefix(name) for name in shapes}
    for marker, kind in _MARKERS:
        if marker in names or any(name.endswith("." + marker) for name in names):
            return kind
    return "unknown"


def require_kind(shapes: Shapes, wanted: str, label: str) -> None:
    """Raise InputError unless the kind of the checkpoint `label` contains `wanted` ('VAE', 'DiT', 'T5')."""
    found = identify(shapes)
    if wanted not in found:
        shown = "is of an unknown kind" if found == "unknown" else f"is a {found}"
        raise InputError(f"{label} {shown}, not a {wanted} checkpoint: give the right file")


def strip_prefix(name: str, prefixes: Sequence[str] = _PREFIXES) -> str:
    """Return the name without the first matching prefix; default: the prefixes that other tools add to a DiT."""
    for prefix in prefixes:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def dit_rename(shapes: Shapes) -> Rename:
    """Return the function from the names of this DiT checkpoint to the official ones."""
    stripped = [strip_prefix(name) for name in shapes]
    if "condition_embedder.time_embedder.linear_1.weight" in stripped:
        return lambda name: official_name(strip_prefix(name))
    return strip_prefix


# diffusers' WanTransformer3DModel -> official, outside and inside a block. Every tensor keeps its shape.
_OUTER = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
_INNER = {
    "scale_shift_table": "modulation",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_in": "before_proj",
    "proj_out": "after_proj",
    **{
        f"{theirs}.{their_part}": f"{ours}.{our_part}"
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for their_part, our_part in (
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "o"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
            ("add_k_proj", "k_img"),
            ("add_v_proj", "v_img"),
            ("norm_added_k", "norm_k_img"),
        )
    },
}


def official_name(name: str) -> str:
    """Return the official name of a DiT tensor or module with a diffusers name; other names are unchanged."""
    return _renamed_head(name, _INNER, _OUTER)


def diffusers_name(name: str) -> str:
    """Return the diffusers name of an official one; the inverse of `official_name`."""
    return _renamed_head(name, *({theirs: ours for ours, theirs in table.items()} for table in (_INNER, _OUTER)))


def _renamed_head(name: str, inner: Mapping[str, str], outer: Mapping[str, str]) -> str:
    """Rename with `inner` within a block, and with `outer` outside of blocks."""
    part = read_block_name(name)
    return _replace_head(name, outer) if part is None else f"{part.block}.{_replace_head(part.rest, inner)}"


def _replace_head(name: str, table: Mapping[str, str]) -> str:
    """Replace the longest leading sequence of name parts that is in the table."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        head = ".".join(parts[:count])
        if head in table:
            return ".".join([table[head], *parts[count:]])
    return name


def renamed(tensors: Pairs, rename: Rename) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors with new names."""
    for name, tensor in tensors:
        yield rename(name), tensor


def check_names(shapes: Shapes, model: nn.Module, label: str) -> None:
    """Raise InputError that lists the first ten missing, unexpected or misshapen tensors."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    faults = [f"missing {name} {list(shape)}" for name, shape in wanted.items() if name not in shapes]
    faults += [f"unexpected {name} {list(shape)}" for name, shape in shapes.items() if name not in wanted]
    faults += [
        f"misshapen {name} {list(shapes[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    if faults:
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise InputError(f"{label} does not match the model: {'; '.join(faults[:10])}{more}")


def fill(
    model: nn.Module,
    tensors: Pairs,
    *,
    device: torch.device | str | Callable[[str], torch.device],
    dtype: torch.dtype | Callable[[str, Tensor], torch.dtype] | None = None,
    label: str,
) -> None:
    """Load weights into a model on the meta device, one tensor at a time to limit peak memory.

    `device` may be a function of the name, and `dtype` of name and tensor; `dtype` None keeps each tensor's dtype.
    Tensors are copied, so the file may be closed. For sharded weights only this process's shard is kept. Raises
    InputError like `check_names`.
    """
    slots = model.state_dict()
    buffers = {name for name, _ in model.named_buffers()}
    seen: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors:
        seen[name] = tuple(tensor.shape)
        if name not in slots or slots[name].shape != tensor.shape:
            continue  # reported by `check_names` below
        owner_name, _, leaf = name.rpartition(".")
        where = device(name) if callable(device) else device
        kind = dtype(name, tensor) if callable(dtype) else dtype
        value = keep_part(slots[name], tensor, torch.device(where), kind or tensor.dtype)
        owner = model.get_submodule(owner_name)
        setattr(owner, leaf, value if name in buffers else nn.Parameter(value, requires_grad=False))
    check_names(seen, model, label)
