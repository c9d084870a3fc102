"""The UMT5-XXL encoder that turns prompts into the DiT's context: transformers' model, under anyone's names.

B texts, L tokens, dim 4096 in the published model. Bidirectional, with a relative position bias per layer.
"""

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import UMT5EncoderModel
from transformers.models.umt5.modeling_umt5 import UMT5DenseGatedActDense

from wan_train.errors import InputError
from wan_train.models.encoders.text_files import (
    EMBEDDED_TOKENIZER,
    describe,
    fill_fp8,
    fill_wide,
    make_empty,
    storage_dtype,
)
from wan_train.models.encoders.tokenizer import Tokenizer, find_tokenizer, read_tokenizer, tokenizer_of_sentencepiece
from wan_train.placement.sharding import Sharding
from wan_train.precision import compute_dtype, take_rows, upcast_on_use
from wan_train.storage import TensorSource, read_header, read_tensors


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
            raise InputError("this text encoder accepts token ids only: load it with a tokenizer")
        if isinstance(texts, str):
            raise TypeError("expected a list of texts, not a single text")
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
        device = self.model.encoder.final_layer_norm.weight.device  # the token table may be elsewhere
        encoded: Tensor = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        return encoded


def load_text_encoder(
    source: TensorSource,
    *,
    tokenizer: str | os.PathLike[str] | None = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    fp8: bool = False,
    sharding: Sharding | None = None,
) -> TextEncoder:
    """Load the UMT5 encoder, frozen.

    `source`: a .pth, safetensors file or folder of shards, or a state dict, under official, transformers or ComfyUI
    names, fp8 files with and without scales among them. `tokenizer`: a folder or file, None for none, or "auto":
    google/umt5-xxl beside the file, else the one inside it, else the hub's. The weights are `dtype` (None: as stored,
    and bfloat16 for 8 bits); on a CPU they stay so and compute in float32. `fp8` keeps the blocks' matrices in
    8 bits, e4m3 with a scale for every 64 inputs or what an fp8 file has, and the token table in CPU RAM.
    `sharding` splits the blocks' matrices over processes, which then have to encode the same texts together. Raises
    InputError when the file or the tokenizer cannot be used.
    """
    label = describe(source)
    header = read_header(source)
    model = make_empty(header, label)
    reader = None
    if tokenizer is not None:
        reader = _read_tokenizer(tokenizer, source, embedded=EMBEDDED_TOKENIZER in header.shapes, label=label)
        if reader.num_tokens > (known := model.config.vocab_size):
            raise InputError(f"the tokenizer has {reader.num_tokens} tokens, {label} knows {known}: give its own")
    if sharding is not None:
        sharding.split(model, list(model.encoder.block))
    dtype = dtype or storage_dtype(header)
    (fill_fp8 if fp8 else fill_wide)(model, source, device=torch.device(device), dtype=dtype)
    model.encoder.embed_tokens = model.shared
    computing = compute_dtype(device, dtype)
    if fp8 or computing != dtype:
        _upcast(model, computing)
    return TextEncoder(model, reader).eval()


def check_text_encoder(
    source: TensorSource, tokenizer: str | os.PathLike[str] | None = "auto", flag: str = "--t5"
) -> None:
    """Raise InputError unless `load_text_encoder` would take the file, by its header, and the tokenizer is found.

    A tokenizer that only the hub has is downloaded now: that may fail, and then in good time.
    """
    label = flag if isinstance(source, Mapping) else f"{flag} {os.fspath(source)}"
    header = read_header(source)
    make_empty(header, label)
    if tokenizer is not None:
        find_tokenizer(tokenizer, source, embedded=EMBEDDED_TOKENIZER in header.shapes)


def _read_tokenizer(wanted: str | os.PathLike[str], source: TensorSource, *, embedded: bool, label: str) -> Tokenizer:
    path = find_tokenizer(wanted, source, embedded=embedded)
    if path is not None:
        return read_tokenizer(path)
    model = next(tensor for name, tensor in read_tensors(source) if name == EMBEDDED_TOKENIZER)
    return tokenizer_of_sentencepiece(model.numpy().tobytes(), label)


class _FeedForward(UMT5DenseGatedActDense):  # type: ignore[misc]
    """transformers' layer without its rounding to the dtype in which `wo` is stored: ours computes in another."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wo(self.act(self.wi_0(x)) * self.wi_1(x))
        return y


def _upcast(model: UMT5EncoderModel, dtype: torch.dtype) -> None:
    """Let the model compute in `dtype`, whatever its matrices are stored in and wherever its token table is."""
    take_rows(model.shared, dtype)
    for part in model.modules():
        if type(part) is UMT5DenseGatedActDense:
            part.__class__ = _FeedForward
    upcast_on_use(model, dtype)
