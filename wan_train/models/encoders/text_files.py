"""UMT5-XXL checkpoints: tensor names, storage formats, and loading them into transformers' model.

`M` below is a module's name in transformers' model.
"""

import os
from collections.abc import Iterator, Mapping
from statistics import mode
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from wan_train.errors import InputError
from wan_train.models.weights import Rename, Shapes, check_names, fill, renamed, require_kind
from wan_train.precision import name_of
from wan_train.quantization.schemes import SCALE, SCHEMES, quantised, scale_shape
from wan_train.quantization.stored import StoragePlan, dtypes_kept, is_auxiliary, read_scales, unscaled
from wan_train.storage import Header, TensorSource, read_header, read_tensors

T = TypeVar("T")

EMBEDDED_TOKENIZER = "spiece_model"  # bytes of a SentencePiece model, embedded in ComfyUI's files

_SCHEME = SCHEMES["fp8_scaled"]
_TABLE = "shared.weight"
_TIED = "encoder.embed_tokens.weight"  # some files contain the token embedding twice

# Official -> transformers' UMT5EncoderModel, outside and inside a block. Every tensor keeps its shape.
_OUTER = {"token_embedding.weight": _TABLE, "norm.weight": "encoder.final_layer_norm.weight"}
_INNER = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def make_empty(header: Header, label: str) -> UMT5EncoderModel:
    """Return the model on the meta device whose weights match these tensors exactly. Raises InputError if there is
    none."""
    require_kind(header.shapes, "T5", label)
    shapes = _of_weights(header, header.shapes)
    with torch.device("meta"):
        model = UMT5EncoderModel(read_config(shapes))
    # Tied to `shared` once that is filled.
    model.encoder.embed_tokens = nn.Identity()
    check_names(shapes, model, label)
    _check_numbers(header, label)
    return model


def _check_numbers(header: Header, label: str) -> None:
    """Raise InputError unless all weights are stored as floats or as floats times a scale."""
    weights = _of_weights(header, header.dtypes)
    scales = {name: dtype for name, dtype in header.dtypes.items() if "scale" in name.rpartition(".")[2]}
    for name, dtype in {**weights, **scales}.items():
        if not dtype.is_floating_point:
            raise InputError(f"{label} stores {name} as {name_of(dtype)}: give a bf16, fp16, fp32 or fp8 file")
    empty = {name: torch.empty(shape, device="meta") for name, shape in header.shapes.items() if is_auxiliary(name)}
    _scales(empty, header)


def fill_wide(model: UMT5EncoderModel, source: TensorSource, *, device: torch.device, dtype: torch.dtype) -> None:
    """Load the file's weights in `dtype`, multiplied by their scales if any."""
    header = read_header(source)
    tensors = unscaled(_weights(source, header), _scales(source, header), kept=())
    fill(model, tensors, device=device, dtype=dtype, label=describe(source))


def fill_fp8(model: UMT5EncoderModel, source: TensorSource, *, device: torch.device, dtype: torch.dtype) -> None:
    """Load the blocks' matrices in 8 bits and the rest in `dtype`; `M.scale_weight` is the scale of M.

    Matrices that the file stores in 8 bits are kept with their scale, if any; others are quantised while loading. The
    token embedding stays in CPU RAM: a prompt needs only a few rows of it, and in 8 bits its error would be as large as
    that of all matrices together.
    """
    header = read_header(source)
    scales, stored = _scales(source, header), _of_weights(header, header.dtypes)
    linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    kept = {name: scales.get(name) for name in linears if stored[f"{name}.weight"].itemsize == 1}
    plan = StoragePlan({name: _SCHEME for name in linears if name not in kept}, kept)
    _expect_codes(model, plan)
    tensors = quantised(unscaled(_weights(source, header), scales, kept), plan.schemes, device)
    host = torch.device("cpu")
    fill(
        model,
        tensors,
        device=lambda name: host if name == _TABLE else device,
        dtype=dtypes_kept(stored, dtype, plan.codes()),
        label=describe(source),
    )


def _expect_codes(model: UMT5EncoderModel, plan: StoragePlan) -> None:
    """Register empty scales on the Linears of the plan."""
    shapes = {name: None if scale is None else tuple(scale.shape) for name, scale in plan.kept.items()}
    for name, scheme in plan.schemes.items():
        shapes[name] = scale_shape(scheme, tuple(model.get_submodule(name).weight.shape))
    for name, shape in shapes.items():
        if shape is not None:
            model.get_submodule(name).register_buffer(SCALE, torch.empty(shape, device="meta"))


def describe(source: TensorSource) -> str:
    """Return the name of a source for messages."""
    return "the text encoder's state dict" if isinstance(source, Mapping) else os.fspath(source)


def storage_dtype(header: Header) -> torch.dtype:
    """Return the dtype of most weights, or bfloat16 for 8-bit files, whose dtype cannot be computed in."""
    stored = mode(_of_weights(header, header.dtypes).values())
    return torch.bfloat16 if stored.itemsize == 1 else stored


def t5_rename(shapes: Shapes) -> Rename:
    """Return the function from the names of this text encoder checkpoint to transformers' names."""
    if any(name.endswith(".pos_embedding.embedding.weight") for name in shapes):
        return lambda name: _transformers_name(name.removeprefix("encoder."))
    tied_only = _TIED in shapes and _TABLE not in shapes
    return lambda name: _TABLE if tied_only and name == _TIED else name


def _transformers_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    parts = name.split(".")
    inner = ".".join(parts[2:-1])
    if parts[0] != "blocks" or inner not in _INNER:
        return name
    return ".".join(["encoder.block", parts[1], _INNER[inner], parts[-1]])


def _dropped(shapes: Shapes) -> set[str]:
    """Return the names of tensors that are not weights, or duplicates."""
    names = {EMBEDDED_TOKENIZER, *filter(is_auxiliary, shapes)}
    if shapes.get(_TIED) == shapes.get(_TABLE):
        names.add(_TIED)
    return names


def _of_weights(header: Header, values: Mapping[str, T]) -> dict[str, T]:
    """Return the header's value for each weight, by transformers' name."""
    rename, dropped = t5_rename(header.shapes), _dropped(header.shapes)
    return {rename(name): value for name, value in values.items() if name not in dropped}


def _weights(source: TensorSource, header: Header) -> Iterator[tuple[str, Tensor]]:
    """Yield the file's weights with transformers' names."""
    dropped = _dropped(header.shapes)
    tensors = ((name, tensor) for name, tensor in read_tensors(source) if name not in dropped)
    return renamed(tensors, t5_rename(header.shapes))


def _scales(source: TensorSource, header: Header) -> dict[str, Tensor]:
    """Return the scales of a scaled file by M. Raises InputError for a scale that does not fit its matrix."""
    rename = t5_rename(header.shapes)
    shapes = {rename(name): shape for name, shape in header.shapes.items()}
    return read_scales(source, header, lambda module: rename(f"{module}.weight").removesuffix(".weight"), shapes)


def read_config(shapes: Shapes) -> UMT5Config:
    """Infer the configuration from transformers' names and shapes; where they are missing, use the published one.

    Each size is the most frequent one over blocks, so that a single wrong tensor is reported as such later.
    """
    blocks = {name.split(".")[2] for name in shapes if name.startswith("encoder.block.")}
    vocabulary, dim = _sizes(shapes, _TABLE, (256384, 4096))
    num_buckets, num_heads = _sizes(shapes, "SelfAttention.relative_attention_bias.weight", (32, 64))
    inner = _sizes(shapes, "SelfAttention.q.weight", (4096, 4096))[0]
    return UMT5Config(
        vocab_size=vocabulary,
        d_model=dim,
        d_kv=inner // max(1, num_heads),
        d_ff=_sizes(shapes, "DenseReluDense.wi_0.weight", (10240, 4096))[0],
        num_layers=len(blocks),
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        dropout_rate=0.0,
        use_cache=False,
    )


def _sizes(shapes: Shapes, ending: str, published: tuple[int, int]) -> tuple[int, int]:
    """Return the most frequent shape of the matrices with this name ending."""
    found = [(shape[0], shape[1]) for name, shape in shapes.items() if name.endswith(ending) and len(shape) == 2]
    return mode(found) if found else published
