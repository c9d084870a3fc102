"""A process of `test_strips.py`: frames shared out in strips, held against the same frames undivided.

    python tests/unit/models/vae/strip_parts.py RESULT ROWS FRAMES [ROWS FRAMES ...]

Writes RESULT.RANK: of each kind of VAE and size the largest differences of latents and of pixels, the latter None where
there are none but in another process, and the largest number of rows that entered the decoder's last layer.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

import torch
import torch.distributed as dist
from torch import Tensor

from tests.unit.models.vae.vaes import WAN21, WAN22, SmallVae
from wan_train.distributed.groups import make_groups
from wan_train.distributed.ranks import find_place
from wan_train.distributed.settings import ParallelSettings
from wan_train.models.vae.strips import Strips
from wan_train.models.vae.vae import load_vae


def compare(small: SmallVae, strips: Strips, rows: int, frames: int) -> list[Any]:
    vae = load_vae(small.weights)
    pixels, latents = small.pixels(1, frames, rows, 2), small.latents(1, 1 + (frames - 1) // 4, rows, 2)
    encoded, decoded = vae.encode(pixels), vae.decode(latents)
    vae.strips, seen = strips, []
    hook = vae.decoder.head["2"].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[-2]))
    chunks = list(vae.decode_chunks(latents))
    hook.remove()
    assert bool(chunks) == (strips.split.rank == 0)
    far = largest(torch.cat(chunks, dim=2), decoded) if chunks else None
    return [largest(vae.encode(pixels), encoded), far, max(seen)]


def largest(ours: Tensor, right: Tensor) -> float:
    assert ours.shape == right.shape
    return float((ours - right).abs().max())


def main(result: str, *sizes: str) -> None:
    groups = make_groups(ParallelSettings(ulysses_size=find_place().num_ranks), torch.device("cpu"))
    strips, found = Strips(groups.whole), {}
    for rows, frames in zip(map(int, sizes[::2]), map(int, sizes[1::2]), strict=True):
        for small in (WAN21, WAN22):
            found[f"{small.name} {rows} {frames}"] = compare(small, strips, rows, frames)
    Path(f"{result}.{groups.place.rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
