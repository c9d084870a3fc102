"""Measure peak memory and seconds per step of the 14B geometry with random weights, by memory saving options: of a LoRA
and, in cells that begin with `full`, of full fine-tuning.

Each cell runs in its own process. On a GPU the model has its 40 blocks and the peak is the memory torch allocated on
the device; on a CPU it has four blocks, and the peak is that of the process. `weights_gib` is the size of the weights
on the device, including the adapter's.

    python benchmarks/memory.py [--cells resident swap_all ...] [--sizes 480x832x1 480x832x49] [--steps 3]
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from wan_train.placement.settings import RecomputeSettings, StreamSettings
from wan_train.quantization.settings import WeightSettings

DIM, FFN, HEADS, TEXT, RANK = 5120, 13824, 40, 4096, 32


FULL = RecomputeSettings(recompute="full")
BF16 = WeightSettings()
SCALED = WeightSettings(fp8_base=True, fp8_scaled=True)


@dataclass(frozen=True)
class Cell:
    """One configuration; `swap` is a share of the blocks, at least one of which stays on the device.

    With an `optimizer`, all weights are trained, in bf16; it steps in the backward pass if `fused`, and its states are
    in CPU RAM if `offload`.
    """

    swap: float = 0.0
    weights: WeightSettings = BF16
    activations: RecomputeSettings = FULL
    optimizer: str | None = None
    fused: bool = True
    offload: bool = False


CELLS = {
    "no_recompute": Cell(activations=RecomputeSettings()),
    "resident": Cell(),
    "keep_attention": Cell(activations=RecomputeSettings(recompute="keep_attention")),
    "ffn_chunks_4": Cell(activations=replace(FULL, ffn_chunks=4)),
    "offload": Cell(activations=replace(FULL, gradient_checkpointing_cpu_offload=True)),
    "swap_half": Cell(swap=0.5),
    "swap_all": Cell(swap=1.0),
    "fp8": Cell(weights=WeightSettings(fp8_base=True)),
    "fp8_scaled": Cell(weights=SCALED),
    "int8": Cell(weights=WeightSettings(int8_base=True)),
    "full_8bit": Cell(optimizer="AdamW8bitSR"),
    "full_8bit_ordinary": Cell(optimizer="AdamW8bitSR", fused=False),
    "full_8bit_offload": Cell(optimizer="AdamW8bitSR", offload=True),
    "full_8bit_swap": Cell(swap=1.0, optimizer="AdamW8bitSR", offload=True),
    "full_adafactor": Cell(optimizer="Adafactor"),
    "least": Cell(1.0, SCALED, replace(FULL, gradient_checkpointing_cpu_offload=True, ffn_chunks=4)),
}


def random_weights(shapes: dict[str, tuple[int, ...]], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield bfloat16 weights with the published scale, created one at a time."""
    generator = torch.Generator(device).manual_seed(0)
    for name, shape in shapes.items():
        yield name, torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).mul_(0.02)


def build(cell: Cell, layers: int, device: torch.device):  # type: ignore[no-untyped-def]
    """Return the model with its adapter, the optimizer, the stepping in the backward pass, and the bytes of weights on
    the device."""
    from networks.settings import NetworkSettings
    from wan_train.assemble import ModelSettings, attach_adapter, finish_dit, streamed_names
    from wan_train.models.dit.dit import Dit, DitConfig
    from wan_train.models.loading import Placement, build_dit
    from wan_train.models.settings import DitSettings
    from wan_train.models.stacks import block_matrices
    from wan_train.quantization.schemes import quantised
    from wan_train.quantization.stored import plan_storage
    from wan_train.storage import Header

    with torch.device("meta"):
        shapes = {
            k: tuple(v.shape) for k, v in Dit(DitConfig(DIM, FFN, HEADS, layers, text_dim=TEXT)).state_dict().items()
        }
    header = Header(shapes, dict.fromkeys(shapes, torch.bfloat16), {})
    stream = StreamSettings(blocks_to_swap=min(layers - 1, round(cell.swap * layers)))
    settings = ModelSettings(DitSettings(), cell.weights, stream, cell.activations)
    plan = plan_storage(header, block_matrices(shapes), {}, cell.weights)
    place = Placement(device, None, streamed_names(stream, shapes))
    tensors = quantised(random_weights(shapes, device), plan.schemes, device)
    model = build_dit(header, tensors, source={}, placement=place, plan=plan)
    lora = NetworkSettings(network_dim=RANK, network_alpha=RANK)
    network = lora if cell.optimizer is None else NetworkSettings(network_module="networks.full", full_bf16=True)
    adapter = attach_adapter(model, network, stream, seed=0, device=device)
    stream = finish_dit(model, settings, device)
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    held = weights - stream.host_bytes + stream.device_bytes
    if cell.optimizer is None:
        return model.train(), torch.optim.AdamW(adapter.parameter_groups(1e-4), lr=1e-4), None, held
    return model.train(), *stepping_of(cell, adapter, stream, device), held


def stepping_of(cell: Cell, adapter, stream, device: torch.device):  # type: ignore[no-untyped-def]
    """Return the optimizer of all weights, and the stepping in the backward pass."""
    from wan_train.placement.lanes import make_lane
    from wan_train.placement.states import HostStates
    from wan_train.training.optimizing.fused import FusedBackward
    from wan_train.training.optimizing.optimizers import make_optimizer
    from wan_train.training.optimizing.rounding import rounded
    from wan_train.training.optimizing.stepping import parts_of, states_at_hand
    from wan_train.training.settings import OptimizerSettings

    contexts = [*([states_at_hand(HostStates(make_lane(device)))] if cell.offload else []), rounded(0)]
    settings = OptimizerSettings(optimizer_type=cell.optimizer, learning_rate=1e-5)
    optimizer = make_optimizer(adapter.parameter_groups(1e-5), settings, step_contexts=contexts)
    optimizer.parts = parts_of(dict(adapter.named_parameters()), {None: stream})
    return optimizer, FusedBackward(optimizer, optimizer.parts, limit=1.0) if cell.fused else None


def run_cell(name: str, size: tuple[int, int, int], layers: int, steps: int, pipe: Connection) -> None:
    """Build, run one warm-up step, time the others, and send the results."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, optimizer, fused, held = build(CELLS[name], layers, device)
    height, width, frames = size
    shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    torch.manual_seed(0)
    latents, text = torch.randn(shape, device=device), torch.randn(1, 512, TEXT, device=device)
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        model(latents, torch.tensor([500.0], device=device), text).square().mean().backward()
        if fused is not None:
            fused.finish()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    found = {"s_per_step": round(statistics.median(seconds[1:]), 3), "tokens": shape[2] * shape[3] * shape[4] // 4}
    found["weights_gib"] = round(held / 2**30, 3)
    if device.type == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    else:
        found["peak_process_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
    pipe.send(found)


def main() -> None:
    """Print one line of JSON for each cell."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=list(CELLS)[1:] if on_gpu else list(CELLS), choices=CELLS)
    parser.add_argument(
        "--sizes", nargs="+", default=["480x832x1", "480x832x49", "480x832x81"] if on_gpu else ["256x384x1"]
    )
    parser.add_argument("--layers", type=int, default=40 if on_gpu else 4)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    print(json.dumps({"device": device, "torch": torch.__version__, "layers": options.layers}), flush=True)
    context = multiprocessing.get_context("spawn")
    for text in options.sizes:
        size = tuple(int(part) for part in text.split("x"))
        for name in options.cells:
            ours, theirs = context.Pipe()
            process = context.Process(target=run_cell, args=(name, size, options.layers, options.steps, theirs))
            process.start()
            theirs.close()
            try:
                found = ours.recv()
            except EOFError:
                found = {"failed": True}
            process.join()
            print(json.dumps({"cell": name, "size": text} | found), flush=True)


if __name__ == "__main__":
    main()
