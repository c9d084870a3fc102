"""The UMT5-XXL encoder that turns prompts into the DiT's context: transformers' model, under anyone's names.

B texts, L tokens, dim 4096 in the published model. Bidirectional, with a relative position bias per layer.
"""

import os
from collections.abc import Mapping, Sequence
from statistics import mode

import torch
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel
from transformers.models.umt5.modeling_umt5 import UMT5DenseGatedActDense

from wan_train.cli import InputError
from wan_train.models.tokenizer import Tokenizer, find_tokenizer, read_tokenizer, tokenizer_of_sentencepiece
from wan_train.models.weights import Rename, Shapes, check_names, fill, renamed, require_kind
from wan_train.precision import compute_dtype, upcast_on_use
from wan_train.storage import TensorSource, read_header, read_tensors

EMBEDDED_TOKENIZER = "spiece_model"  # bytes of a SentencePiece model, as ComfyUI stores them in the file

_TIED = "encoder.embed_tokens.weight"  # some files hold the token table twice

# Official -> transformers' UMT5EncoderModel, outside and inside a block. Every tensor keeps its shape.
_OUTER = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
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


class TextEncoder(nn.Module):
    """Prompts -> their embeddings; make one with `load_text_encoder`."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: Tokenizer | None) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    def forward(self, texts: Sequence[str]) -> list[Tensor]:
        """Texts -> one (L_i, dim) per text, L_i <= 512 its tokens with the end token and without padding.

        float32 on a CPU, else in the model's dtype; on the model's device, without gradient. Raises InputError when the
        encoder has no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError("this text encoder takes ids only: load it with a tokenizer")
        if isinstance(texts, str):
            raise TypeError("a list of texts is wanted, not a single text")
        rows = [torch.tensor(ids, dtype=torch.long) for ids in self.tokenizer(texts)]
        if not rows:
            return []
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        # The copy of each row lets the padded batch go.
        return [out[: len(row)].clone() for out, row in zip(self.encode_ids(ids, mask), rows, strict=True)]

    @torch.no_grad()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids (B, L) and their mask (B, L), 1 for a token, 0 for padding -> (B, L, dim), padding rows too."""
        device = self.model.device
        encoded: Tensor = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        return encoded


def load_text_encoder(
    source: TensorSource,
    *,
    tokenizer: str | os.PathLike[str] | None = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> TextEncoder:
    """Load the UMT5 encoder, frozen.

    `source`: a .pth, safetensors file or folder of shards, or a state dict, under official, transformers or ComfyUI
    names. `tokenizer`: a folder or file, None for none, or "auto": google/umt5-xxl beside the file, else the one inside
    it, else the hub's. The weights are `dtype` (None: as stored); on a CPU they stay so and compute in float32. Raises
    InputError when the file or the tokenizer cannot be used.
    """
    what = "the text encoder's state dict" if isinstance(source, Mapping) else os.fspath(source)
    header = read_header(source)
    model = _make_empty(header.shapes, what)
    reader = None
    if tokenizer is not None:
        reader = _read_tokenizer(tokenizer, source, embedded=EMBEDDED_TOKENIZER in header.shapes, what=what)
        if reader.num_tokens > (known := model.config.vocab_size):
            raise InputError(f"the tokenizer has {reader.num_tokens} tokens, {what} knows {known}: give its own")
    dropped = _dropped(header.shapes)
    tensors = ((name, tensor) for name, tensor in read_tensors(source) if name not in dropped)
    dtype = dtype or _storage_dtype(header.dtypes)
    fill(model, renamed(tensors, t5_rename(header.shapes)), device=device, dtype=dtype, what=what)
    model.encoder.embed_tokens = model.shared
    if (computing := compute_dtype(device, dtype)) != dtype:
        _upcast(model, computing)
    return TextEncoder(model, reader).eval()


def check_text_encoder(
    source: TensorSource, tokenizer: str | os.PathLike[str] | None = "auto", flag: str = "--t5"
) -> None:
    """Raise InputError unless `load_text_encoder` would take the file, by its header, and the tokenizer is found.

    A tokenizer that only the hub has is downloaded now: that may fail, and then in good time.
    """
    what = flag if isinstance(source, Mapping) else f"{flag} {os.fspath(source)}"
    shapes = read_header(source).shapes
    _make_empty(shapes, what)
    if tokenizer is not None:
        find_tokenizer(tokenizer, source, embedded=EMBEDDED_TOKENIZER in shapes)


def t5_rename(shapes: Shapes) -> Rename:
    """The function from the names of this text encoder checkpoint to transformers'."""
    if any(name.endswith(".pos_embedding.embedding.weight") for name in shapes):
        return lambda name: _transformers_name(name.removeprefix("encoder."))
    tied_only = _TIED in shapes and "shared.weight" not in shapes
    return lambda name: "shared.weight" if tied_only and name == _TIED else name


def _transformers_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    parts = name.split(".")
    inner = ".".join(parts[2:-1])
    if parts[0] != "blocks" or inner not in _INNER:
        return name
    return ".".join(["encoder.block", parts[1], _INNER[inner], parts[-1]])


def _dropped(shapes: Shapes) -> set[str]:
    """The names that are no weights of their own."""
    names = {EMBEDDED_TOKENIZER}
    if shapes.get(_TIED) == shapes.get("shared.weight"):
        names.add(_TIED)
    return names


def _make_empty(shapes: Shapes, what: str) -> UMT5EncoderModel:
    """The model on `meta` that these tensors fill exactly, or an InputError."""
    require_kind(shapes, "T5", what)
    if any(name == "scaled_fp8" or name.endswith(".scale_weight") for name in shapes):
        raise InputError(f"{what} is a scaled fp8 file: give the fp16 or bf16 one")
    rename, dropped = t5_rename(shapes), _dropped(shapes)
    ours = {rename(name): shape for name, shape in shapes.items() if name not in dropped}
    with torch.device("meta"):
        model = UMT5EncoderModel(read_config(ours))
    # Tied to `shared` once that is filled.
    model.encoder.embed_tokens = nn.Identity()
    check_names(ours, model, what)
    return model


def read_config(shapes: Shapes) -> UMT5Config:
    """The configuration that transformers' names and these shapes describe; where they say nothing, the published one.

    Each size is the one that most blocks agree on, so that a single wrong tensor is later reported as just that.
    """
    blocks = {name.split(".")[2] for name in shapes if name.startswith("encoder.block.")}
    vocabulary, dim = _sizes(shapes, "shared.weight", (256384, 4096))
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
    """The commonest shape of the matrices whose name ends so."""
    found = [(shape[0], shape[1]) for name, shape in shapes.items() if name.endswith(ending) and len(shape) == 2]
    return mode(found) if found else published


def _read_tokenizer(wanted: str | os.PathLike[str], source: TensorSource, *, embedded: bool, what: str) -> Tokenizer:
    path = find_tokenizer(wanted, source, embedded=embedded)
    if path is not None:
        return read_tokenizer(path)
    model = next(tensor for name, tensor in read_tensors(source) if name == EMBEDDED_TOKENIZER)
    return tokenizer_of_sentencepiece(model.numpy().tobytes(), what)


class _FeedForward(UMT5DenseGatedActDense):  # type: ignore[misc]
    """transformers' layer without its rounding to the dtype in which `wo` is stored: ours computes in another."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wo(self.act(self.wi_0(x)) * self.wi_1(x))
        return y


def _upcast(model: UMT5EncoderModel, dtype: torch.dtype) -> None:
    """Let the model compute in `dtype`, whatever its matrices are stored in."""
    for part in model.modules():
        if type(part) is UMT5DenseGatedActDense:
            part.__class__ = _FeedForward
    upcast_on_use(model, dtype)


def _storage_dtype(dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """What most tensors are stored in; eight bits are too few to compute with, and become bfloat16."""
    stored = mode(dtypes.values())
    return torch.bfloat16 if stored.itemsize == 1 else stored
