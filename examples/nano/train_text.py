"""Train the text encoder of the small model so that each token of a caption encodes the whole caption.

It is trained with a linear layer for each attribute, which is discarded afterwards; then it is frozen, and the DiT is
trained on its output.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.nano.state import Trail
from examples.nano.words import known_words, make_tokenizer
from examples.nano.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene, training_scenes
from wan_train.models.encoders.text import TextEncoder, load_text_encoder

DIM, FFN, LAYERS, HEADS = 64, 128, 2, 4
STEPS, BATCH, RATE = 600, 64, 2e-3

_ATTRIBUTES: Mapping[str, list[str]] = {
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "motion": list(MOTIONS),
    "background": list(BACKGROUNDS),
}


def make_text_encoder(tokenizer: Path, seed: int = 0) -> TextEncoder:
    """Return a text encoder with random weights and official names, and its tokenizer, which is written to a folder."""
    vocabulary = make_tokenizer(tokenizer, known_words())
    torch.manual_seed(seed)
    state: dict[str, Tensor] = {"token_embedding.weight": torch.randn(vocabulary, DIM), "norm.weight": torch.ones(DIM)}
    for block in (f"blocks.{i}" for i in range(LAYERS)):
        state |= {f"{block}.norm{n}.weight": torch.ones(DIM) for n in (1, 2)}
        state |= {f"{block}.attn.{part}.weight": torch.randn(DIM, DIM) * DIM**-0.5 for part in "qkvo"}
        state[f"{block}.attn.q.weight"] *= (DIM // HEADS) ** -0.5  # T5 does not divide by the root of the width
        state[f"{block}.pos_embedding.embedding.weight"] = torch.zeros(32, HEADS)
        state |= {f"{block}.ffn.{part}.weight": torch.randn(FFN, DIM) * DIM**-0.5 for part in ("gate.0", "fc1")}
        state[f"{block}.ffn.fc2.weight"] = torch.randn(DIM, FFN) * FFN**-0.5
    return load_text_encoder(state, tokenizer=tokenizer)


def train_text_encoder(tokenizer: Path, trail: Trail) -> TextEncoder:
    """Return the trained text encoder."""
    encoder = make_text_encoder(tokenizer)
    encoder.requires_grad_(True)
    heads = nn.ModuleDict({name: nn.Linear(DIM, len(values)) for name, values in _ATTRIBUTES.items()})
    # Words that occur in no caption keep their initial embeddings, which get no gradient.
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=RATE, weight_decay=0.0)
    scenes, draw = training_scenes(), torch.Generator().manual_seed(0)
    for step in range(1, STEPS + 1):
        chosen = [scenes[int(index)] for index in torch.randint(len(scenes), (BATCH,), generator=draw)]
        loss = _loss(encoder, heads, chosen)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        trail.note("text", step, loss.item())
    return encoder.requires_grad_(False).eval()


def _loss(encoder: TextEncoder, heads: nn.ModuleDict, scenes: list[Scene]) -> Tensor:
    assert encoder.tokenizer is not None
    rows = [torch.tensor(ids) for ids in encoder.tokenizer([scene.caption for scene in scenes])]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    outputs = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    lengths = mask.sum(1)
    losses = []
    for name, values in _ATTRIBUTES.items():
        target = torch.tensor([values.index(getattr(scene, name)) for scene in scenes]).repeat_interleave(lengths)
        losses.append(F.cross_entropy(heads[name](outputs), target))
    return torch.stack(losses).sum()
