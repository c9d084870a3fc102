"""A process of `test_sharing.py`: passes of tiny models shared out, held against the same passes of this process alone.

    python tests/unit/sampling/shared_passes.py RESULT ULYSSES RING CFG [ULYSSES RING CFG ...]

Writes RESULT.RANK: for each combination, by name, the relative difference and the largest attention that was computed
here, in heads x queries x keys of all of them.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.distributed as dist
from torch import Tensor

from tests import processes
from tests.tiny.make import draw_weight
from wan_train.conditions.conditions import Conditions
from wan_train.distributed import ring
from wan_train.distributed.groups import make_groups
from wan_train.distributed.settings import ParallelSettings
from wan_train.models.dit.attention import attend_torch
from wan_train.models.dit.dit import Dit
from wan_train.models.dit.layers import DitConfig
from wan_train.models.stacks import all_blocks
from wan_train.models.variants import VARIANTS
from wan_train.sampling.denoise import Sampling
from wan_train.sampling.grammar import parse_line
from wan_train.sampling.passes import ALONE
from wan_train.sampling.request import preview_defaults
from wan_train.sampling.sharing import Shared

CPU = torch.device("cpu")
HEADS, FRAMES, HEIGHT, WIDTH = 4, 3, 6, 10  # 3 x 5 patches of each frame: no even share of anything
TOKENS = FRAMES * HEIGHT * WIDTH // 4
KINDS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "i2v": {"in_dim": 36, "image_dim": 32},
    "ti2v": {},
    "vace": {"vace_dim": 96, "vace_layers": (0, 2)},
    "reference": {"in_dim": 48, "reference": True, "image_dim": 32},
}


def make_dit(**parts: Any) -> Dit:
    torch.manual_seed(0)
    config = DitConfig(dim=24 * HEADS, ffn_dim=128, num_heads=HEADS, num_layers=3, text_dim=16, freq_dim=32, **parts)
    model = Dit(config).requires_grad_(False)
    model.load_state_dict({name: draw_weight(name, value.shape) for name, value in model.state_dict().items()})
    return model


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def inputs_of(kind: str) -> tuple[Tensor, Tensor, list[Tensor], dict[str, Tensor]]:
    latents, size = drawn(1, 16, FRAMES, HEIGHT, WIDTH), (FRAMES, HEIGHT, WIDTH)
    timestep = torch.tensor([[0.0, 500.0, 700.0]]) if kind == "ti2v" else torch.tensor([500.0])
    beside = {
        "t2v": {},
        "i2v": {"image_latents": drawn(1, 20, *size), "clip_features": drawn(1, 257, 32)},
        "ti2v": {},
        "vace": {"vace_context": drawn(1, 96, *size)},
        "reference": {
            "image_latents": drawn(1, 32, *size),
            "clip_features": drawn(1, 257, 32),
            "reference_latents": drawn(1, 16, 1, HEIGHT, WIDTH),
        },
    }[kind]
    return latents, timestep, [drawn(7, 16)], beside


def sample(model: Dit, sharing: Any) -> Tensor:
    line = "a --w 80 --h 48 --f 9 --s 4 --d 3 --l 4 --slg_layers 1 --slg_end 0.6 --cfg_skip_mode late"
    request = parse_line(f"{line} --cfg_apply_ratio 0.75", preview_defaults(VARIANTS["t2v-1.3B"]))
    texts = Conditions((drawn(7, 16),)), Conditions((drawn(5, 16),))
    sampling = Sampling(request, *texts, sharing=sharing, device=CPU)
    sampling.advance(model, quiet=True)
    return sampling.latents


class Counted:
    """Self-attention that notes the largest of what it is asked for."""

    def __init__(self) -> None:
        self.largest = 0

    def note(self, query: Tensor, key: Tensor) -> None:
        self.largest = max(self.largest, query.shape[2] * query.shape[1] * key.shape[1])

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.note(query, key)
        return attend_torch(query, key, value)

    def with_sums(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Any:
            self.note(query, key)
            return inner(query, key, value)

        return attend


def difference(ours: Tensor, right: Tensor) -> float:
    return float((ours - right).norm() / right.norm())


@torch.no_grad()
def compare(settings: ParallelSettings, models: dict[str, Dit]) -> dict[str, list[float]]:
    groups, found = make_groups(settings, CPU), {}
    sharing, counted, with_sums = Shared(groups), Counted(), ring.attend_with_sums
    for kind, model in models.items():
        latents, timestep, context, beside = inputs_of(kind)
        alone = model(latents, timestep, context, **beside)
        for block in all_blocks(model):
            block.self_attn.attend = counted.attend  # type: ignore[union-attr]
        ring.attend_with_sums, counted.largest = counted.with_sums(with_sums), 0
        with sharing.around(model):
            shared = model(latents, timestep, context, **beside)
        ring.attend_with_sums = with_sums
        found[kind] = [difference(shared, alone), counted.largest]
        again = model(latents, timestep, context, **beside)
        assert torch.equal(again, alone), "what was wrapped is as before"
    found["sampling"] = [difference(sample(models["t2v"], sharing), sample(models["t2v"], ALONE)), 0]
    # The next combination meets at another port: this one's may still be in use.
    port: list[int | None] = [processes.free_port() if groups.place.rank == 0 else None]
    dist.broadcast_object_list(port, src=0)
    os.environ["MASTER_PORT"] = str(port[0])
    dist.barrier()
    dist.destroy_process_group()
    return found


def main(result: str, *sizes: str) -> None:
    models, found = {kind: make_dit(**parts) for kind, parts in KINDS.items()}, []
    for start in range(0, len(sizes), 3):
        ulysses, ring_size, cfg = map(int, sizes[start : start + 3])
        settings = ParallelSettings(ulysses_size=ulysses, ring_size=ring_size, cfg_size=cfg)
        found.append(compare(settings, models))
    rank = os.environ["RANK"]
    Path(f"{result}.{rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
