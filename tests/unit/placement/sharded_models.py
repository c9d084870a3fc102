"""A process of `test_sharding.py`: models whose weights are split over processes, held against whole ones.

    python tests/unit/placement/sharded_models.py RESULT FOLDER ULYSSES RING CFG

Writes RESULT.RANK: by name of what was tried, a relative difference, and for models numbers of elements: the most that
were there while loading, those of the largest tensor, those kept, and those of a whole model and of what is split of
it.
"""

import json
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from networks.attached import attach_loras
from tests.tiny.make import T5
from tests.unit.sampling.shared_passes import CPU, KINDS, difference, inputs_of, sample
from wan_train.assemble import ModelSettings, WeightedLora, assemble_dit, finish_dit
from wan_train.distributed.groups import Groups, make_groups
from wan_train.distributed.settings import ParallelSettings
from wan_train.models import weights
from wan_train.models.encoders.text import load_text_encoder
from wan_train.models.loading import linear_shapes
from wan_train.models.settings import DitSettings
from wan_train.models.stacks import all_blocks
from wan_train.placement.settings import CompileSettings
from wan_train.placement.sharding import Sharding, make_sharding
from wan_train.quantization.settings import FastWeightSettings, WeightSettings
from wan_train.sampling.passes import ALONE
from wan_train.sampling.sharing import Shared

STORED = {
    "fp8": WeightSettings(fp8_base=True),
    "fp8_scaled": WeightSettings(fp8_base=True, fp8_scaled=True),
    "fp8_fast": FastWeightSettings(fp8_base=True, fp8_scaled=True, fp8_fast=True),
    "int8": WeightSettings(int8_base=True, int8_ffn2=True),
}
LORA = "lora.safetensors"


class Watched:
    """The most elements that were there while a model was filled: what it keeps, and whole tensors on their way."""

    def __init__(self) -> None:
        self.most = self.largest = self._kept = 0
        self._whole: list[tuple[weakref.ref[Tensor], int]] = []
        self._keep = weights.keep_part

    def keep(self, slot: Tensor, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        kept = self._keep(slot, tensor, device, dtype)
        self._kept += local(kept).numel()
        self._whole = [(one, count) for one, count in self._whole if one() is not None]
        self._whole.append((weakref.ref(tensor), tensor.numel()))
        self.most = max(self.most, self._kept + sum(count for _, count in self._whole))
        self.largest = max(self.largest, tensor.numel())
        return kept

    def stop(self) -> None:
        weights.keep_part = self._keep


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def elements(model: nn.Module) -> int:
    return sum(local(tensor).numel() for tensor in (*model.parameters(), *model.buffers()))


def matrices(blocks: list[nn.Module]) -> list[Tensor]:
    return [part.weight for block in blocks for part in block.modules() if isinstance(part, nn.Linear)]


def watched(load: Callable[[], nn.Module]) -> tuple[Any, list[int]]:
    """A model, and the most elements that were there while it was loaded and those of the largest tensor."""
    watch = Watched()
    weights.keep_part = watch.keep
    try:
        return load(), [watch.most, watch.largest]
    finally:
        watch.stop()


@torch.no_grad()
def compare_dits(folder: Path, groups: Groups, sharding: Sharding) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    sharing = Shared(groups)
    for kind in KINDS:
        settings = ModelSettings(DitSettings(dit=str(folder / f"{kind}.safetensors")))
        whole = assemble_dit(settings, device=CPU)
        model, counts = watched(partial(assemble_dit, settings, device=CPU, sharding=sharding))
        finish_dit(model, settings, CPU)
        latents, timestep, context, beside = inputs_of(kind)
        right = whole(latents, timestep, context, **beside)
        assert all(isinstance(weight, DTensor) for weight in matrices(all_blocks(model)))
        inside = sum(weight.numel() for weight in matrices(all_blocks(whole)))
        counts += [elements(model), elements(whole), inside]
        found[kind] = [difference(model(latents, timestep, context, **beside), right), *counts]
        assert all(isinstance(weight, DTensor) for weight in matrices(all_blocks(model))), "split again after its turn"
        with sharing.around(model):
            found[f"{kind} shared"] = [difference(model(latents, timestep, context, **beside), right)]
        if kind == "t2v":
            found["sampling"] = [difference(sample(model, sharing), sample(whole, ALONE))]
    return found


@torch.no_grad()
def compare_ways(folder: Path, sharding: Sharding) -> dict[str, list[float]]:
    """A sharded model beside a whole one, in each precision, with a LoRA merged or attached, and compiled."""
    dit = DitSettings(dit=str(folder / "t2v.safetensors"))
    latents, timestep, context, _ = inputs_of("t2v")
    lora = WeightedLora(str(folder / LORA), 0.5)

    def made(settings: ModelSettings, split: Sharding | None, *, merge: bool, attach: bool) -> Tensor:
        model = assemble_dit(settings, device=CPU, loras=[lora] * merge, sharding=split)
        if attach:
            names = linear_shapes(dit.dit)
            attach_loras(model, [(lora.read(names), lora.multiplier)], device=CPU)
        finish_dit(model, settings, CPU)
        return model(latents, timestep, context)

    found, plain = {}, made(ModelSettings(dit), None, merge=False, attach=False)
    ways: dict[str, tuple[ModelSettings, bool, bool]] = {
        name: (ModelSettings(dit, weights=stored), False, False) for name, stored in STORED.items()
    }
    ways["merged"] = ModelSettings(dit), True, False
    ways["merged fp8"] = ModelSettings(dit, weights=STORED["fp8_scaled"]), True, False
    ways["attached"] = ModelSettings(dit), False, True
    compiling = CompileSettings(compile=True, compile_backend="eager")
    for name, (settings, merge, attach) in ways.items():
        right = made(settings, None, merge=merge, attach=attach)
        assert difference(right, plain) > 1e-4, "it acts"
        found[name] = [difference(made(settings, sharding, merge=merge, attach=attach), right)]
    found["compiled"] = [
        difference(made(ModelSettings(dit, compile=compiling), sharding, merge=False, attach=False), plain)
    ]
    return found


def compare_texts(folder: Path, sharding: Sharding) -> dict[str, list[float]]:
    found = {}
    for fp8 in (False, True):
        source, texts = folder / T5, ["a red circle moves", "a green triangle moves to the left"]
        whole = load_text_encoder(source, fp8=fp8)
        load = partial(load_text_encoder, source, fp8=fp8, sharding=sharding)
        encoder, counts = watched(load)
        assert all(isinstance(weight, DTensor) for weight in matrices(list(encoder.model.encoder.block)))
        pairs = zip(encoder(texts), whole(texts), strict=True)
        inside = sum(weight.numel() for weight in matrices(list(whole.model.encoder.block)))
        counts += [elements(encoder), elements(whole), inside]
        found["t5 fp8" if fp8 else "t5"] = [max(difference(ours, right) for ours, right in pairs), *counts]
    return found


def main(result: str, folder: str, ulysses: str, ring: str, cfg: str) -> None:
    groups = make_groups(ParallelSettings(ulysses_size=int(ulysses), ring_size=int(ring), cfg_size=int(cfg)), CPU)
    sharding, texts = make_sharding(groups.tokens.group, CPU), make_sharding(groups.whole.group, CPU)
    assert sharding is not None and texts is not None
    found = compare_dits(Path(folder), groups, sharding)
    found |= compare_ways(Path(folder), sharding) | compare_texts(Path(folder), texts)
    Path(f"{result}.{groups.place.rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
