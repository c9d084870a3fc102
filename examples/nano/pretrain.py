"""Pretrain the small model from scratch: text encoder, VAE and DiT, each with the project's own parts.

    python examples/nano/pretrain.py [--folder examples/nano] [--work FOLDER] [--vae_minutes 22] [--dit_minutes 45]

An interrupted run resumes where it stopped. Losses are in FOLDER/losses.jsonl, and the model files in
`--folder`. Minutes are wall-clock time: a faster machine trains for more steps.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.nano.names import CONFIG, DIT, T5, TOKENIZER, VAE
from examples.nano.state import Trail
from examples.nano.train_dit import CONFIG as GEOMETRY
from examples.nano.train_dit import DitSettings, Samples, pad_captions, train_dit
from examples.nano.train_text import train_text_encoder
from examples.nano.train_vae import VaeSettings, normalise_latents, train_vae
from examples.nano.world import draw, training_scenes
from wan_train.models.encoders.text import TextEncoder, load_text_encoder
from wan_train.models.vae.vae import WanVAE, load_vae

CLIPS_PER_SCENE = 16

# The published names of a block's weights, and those of transformers.
_BLOCK = {
    **{f"attn.{part}": f"0.SelfAttention.{part}" for part in "qkvo"},
    "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
    "norm1": "0.layer_norm",
    "norm2": "1.layer_norm",
    "ffn.gate.0": "1.DenseReluDense.wi_0",
    "ffn.fc1": "1.DenseReluDense.wi_1",
    "ffn.fc2": "1.DenseReluDense.wo",
}


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=here, help="folder for the model files")
    parser.add_argument("--work", type=Path, default=here / "work", help="folder for the states to resume from")
    parser.add_argument("--vae_minutes", type=float, default=VaeSettings.minutes)
    parser.add_argument("--dit_minutes", type=float, default=DitSettings.minutes)
    parser.add_argument("--batch", type=int, default=DitSettings.batch)
    given = parser.parse_args()
    trail = Trail(given.folder / "losses.jsonl")
    make_text(given.folder, trail)
    make_vae_file(given.folder, given.work, VaeSettings(minutes=given.vae_minutes), trail)
    samples = make_samples(given.folder, given.work)
    model = train_dit(given.work, samples, DitSettings(minutes=given.dit_minutes, batch=given.batch), trail)
    save_dit(given.folder, model.state_dict())


def make_text(folder: Path, trail: Trail) -> None:
    """Write the tokenizer and the text encoder unless they exist."""
    if (folder / T5).is_file():
        return
    encoder = train_text_encoder(folder / TOKENIZER, trail)
    _save(folder / T5, official_text_names(encoder))


def make_vae_file(folder: Path, work: Path, settings: VaeSettings, trail: Trail) -> None:
    """Write the VAE unless it exists."""
    if (folder / VAE).is_file():
        return
    work.mkdir(parents=True, exist_ok=True)
    vae = train_vae(work, settings, trail)
    normalise_latents(vae)
    _save(folder / VAE, vae.state_dict())


def make_samples(folder: Path, work: Path) -> Samples:
    """Return latents and captions to train on, encoded by the existing files."""
    scenes = training_scenes()
    encoder = load_text_encoder(folder / T5)
    context, lengths = pad_captions([encoder([text])[0] for text in [*(scene.caption for scene in scenes), ""]])
    kept = work / "latents.pt"
    if not kept.is_file():
        vae = load_vae(folder / VAE)
        rows = [
            _encode(vae, [draw(scene, 1000 * number + i) for i in range(CLIPS_PER_SCENE)])
            for number, scene in enumerate(scenes)
        ]
        torch.save(torch.cat(rows), kept)
    latents = torch.load(kept, weights_only=True)
    return Samples(latents, torch.arange(len(scenes)).repeat_interleave(CLIPS_PER_SCENE), context, lengths)


def save_dit(folder: Path, state: dict[str, Tensor], *, in_dim: int = GEOMETRY.in_dim) -> None:
    """Write the DiT and its configuration in the layout of the published folders."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / DIT, state)
    about = {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "dim": GEOMETRY.dim,
        "ffn_dim": GEOMETRY.ffn_dim,
        "freq_dim": GEOMETRY.freq_dim,
        "in_dim": in_dim,
        "out_dim": GEOMETRY.out_dim,
        "num_heads": GEOMETRY.num_heads,
        "num_layers": GEOMETRY.num_layers,
        "text_len": 512,
        "eps": GEOMETRY.eps,
    }
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def official_text_names(encoder: TextEncoder) -> dict[str, Tensor]:
    """Return the encoder's weights with the names of the published file."""
    state = encoder.model.state_dict()
    named = {"token_embedding.weight": state["shared.weight"], "norm.weight": state["encoder.final_layer_norm.weight"]}
    for index in range(encoder.model.config.num_layers):
        theirs = f"encoder.block.{index}.layer"
        for ours, name in _BLOCK.items():
            named[f"blocks.{index}.{ours}.weight"] = state[f"{theirs}.{name}.weight"]
    return named


def _encode(vae: WanVAE, clips: list) -> Tensor:  # type: ignore[type-arg]
    pixels = torch.stack([torch.from_numpy(clip).float().permute(3, 0, 1, 2) / 127.5 - 1 for clip in clips])
    return vae.encode(pixels)


def _save(path: Path, state: dict[str, Tensor]) -> None:
    save_file({name: tensor.detach().bfloat16().contiguous() for name, tensor in state.items()}, path)


if __name__ == "__main__":
    main()
