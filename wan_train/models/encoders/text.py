"""The UMT5-XXL text encoder: transformers' model, loaded from checkpoints with any naming.

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
from wan_train.quantization.schemes import BLOCK
from wan_train.storage import TensorSource, read_header, read_tensors


class TextEncoder(nn.Module):
    """Encode prompts into embeddings; create one with `load_text_encoder`."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: Tokenizer | None) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    def forward(self, texts: Sequence[str]) -> list[Tensor]:
        """Return one (L_i, dim) per text; L_i <= 512 tokens include the end token, not padding.

        The result is float32 on a CPU, else in the model's dtype; on the model's device, without gradient. Raises
        InputError if the encoder has no tokenizer.
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
        # Rows are copied so that the padded batch can be freed.
        return [out[: len(row)].clone() for out, row in zip(self.encode_ids(ids, mask), rows, strict=True)]

    @torch.no_grad()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (B, L, dim), including padding, of token ids (B, L) and their mask (B, L), 1 for tokens, 0 for
        padding."""
        device = self.model.encoder.final_layer_norm.weight.device  # the token embedding may be on a different device
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

    `source`: a .pth, safetensors file or folder of shards, or a state dict, with official, transformers or ComfyUI
    names, including fp8 files with or without scales. `tokenizer`: a folder or file, None for none, or "auto":
    google/umt5-xxl next to the file, else the one inside the file, else the one on the hub. Weights are stored in
    `dtype` (None: as in the file, bfloat16 for 8-bit files); on a CPU they are computed with in float32. `fp8` stores
    the blocks' matrices in 8 bits, as e4m3 with a scale per 64 inputs or as in an fp8 file, and the token embedding in
    CPU RAM. `sharding` shards the blocks' matrices over processes, which must then encode the same texts together.
    Raises InputError if the file or the tokenizer cannot be used.
    """
    label = describe(source)
    header = read_header(source)
    model = make_empty(header, label)
    reader = None
    if tokenizer is not None:
        reader = _read_tokenizer(tokenizer, source, embedded=EMBEDDED_TOKENIZER in header.shapes, label=label)
        if reader.num_tokens > (known := model.config.vocab_size):
            raise InputError(
                f"the tokenizer has {reader.num_tokens} tokens, but {label} has {known}: use its own tokenizer"
            )
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
    """Raise InputError unless `load_text_encoder` accepts the file, by its header, and the tokenizer is found.

    A tokenizer that is only on the hub is downloaded now, so that a failure is reported early.
    """
    label = flag if isinstance(source, Mapping) else f"{flag} {os.fspath(source)}"
    header = read_header(source)
    make_empty(header, label)
    if tokenizer is not None:
        find_tokenizer(tokenizer, source, embedded=EMBEDDED_TOKENIZER in header.shapes)


def text_encoder_bytes(source: TensorSource, *, dtype: torch.dtype | None, fp8: bool) -> int:
    """Return the bytes of the weights that `load_text_encoder` places on an accelerator, from the file's header."""
    header = read_header(source)
    model, width = make_empty(header, describe(source)), (dtype or storage_dtype(header)).itemsize
    of_linears = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    others = sum(parameter.numel() for parameter in model.parameters()) - of_linears
    if not fp8:
        return width * (of_linears + others)
    return of_linears + 4 * of_linears // BLOCK + width * (others - model.shared.weight.numel())


def _read_tokenizer(wanted: str | os.PathLike[str], source: TensorSource, *, embedded: bool, label: str) -> Tokenizer:
    path = find_tokenizer(wanted, source, embedded=embedded)
    if path is not None:
        return read_tokenizer(path)
    model = next(tensor for name, tensor in read_tensors(source) if name == EMBEDDED_TOKENIZER)
    return tokenizer_of_sentencepiece(model.numpy().tobytes(), label)


class _FeedForward(UMT5DenseGatedActDense):  # type: ignore[misc]
    """transformers' layer without the cast to the storage dtype of `wo`, since the compute dtype differs here."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wo(self.act(self.wi_0(x)) * self.wi_1(x))
        return y


def _upcast(model: UMT5EncoderModel, dtype: torch.dtype) -> None:
    """Let the model compute in `dtype`, regardless of the storage dtype and the device of the token embedding."""
    take_rows(model.shared, dtype)
    for part in model.modules():
        if type(part) is UMT5DenseGatedActDense:
            part.__class__ = _FeedForward
    upcast_on_use(model, dtype)
