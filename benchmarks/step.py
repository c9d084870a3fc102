"""Compare with diffusers + peft, side by side: a DiT forward pass, a LoRA step, and one with activation checkpointing.

Each side runs in its own process, so that peak memory is measured separately; the two take turns, step by step, in an
order that alternates, and the ratio is taken within each pair.

    python benchmarks/step.py [--pairs 15] [--threads 2] [--kind forward lora checkpointed]

The size of a block's modulation if each frame has its own timestep, as with Wan2.2's 5B, for latents of several
sizes, compared with a timestep per token; only shapes, no weights:

    python benchmarks/step.py --modulation
"""

import argparse
import json
import multiprocessing
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

DIM, FFN, HEADS, LAYERS, TEXT = 1536, 8960, 12, 4, 4096
LATENTS = (1, 16, 5, 30, 52)
RANK = 16
KINDS = ("forward", "lora", "checkpointed")  # the last: ours keeps attention, theirs recomputes the whole block
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]

Step = Callable[[], None]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, timestep and text of the benchmark."""
    torch.manual_seed(0)
    return torch.randn(LATENTS), torch.tensor([500.0]), torch.randn(1, 512, TEXT)


def ours(step_kind: str) -> Step:
    """Return our DiT, plain or with our LoRA."""
    from networks.adapter import create
    from networks.settings import NetworkSettings
    from wan_train.models.dit.dit import Dit, DitConfig

    model = Dit(DitConfig(DIM, FFN, HEADS, LAYERS, text_dim=TEXT)).requires_grad_(False)
    latents, timestep, text = inputs()
    if step_kind == "forward":
        return lambda: forward(lambda: model(latents, timestep, text))
    adapter = create(model, NetworkSettings(network_dim=RANK, network_alpha=RANK), seed=0)
    if step_kind == "checkpointed":
        from wan_train.placement.recompute import apply_recompute
        from wan_train.placement.settings import RecomputeSettings

        apply_recompute(model.blocks, RecomputeSettings(recompute="keep_attention"), torch.device("cpu"))
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-4), lr=1e-4)
    return lambda: train(lambda: model(latents, timestep, text), optimizer)


def theirs(step_kind: str) -> Step:
    """Return diffusers' WanTransformer3DModel, plain or with peft's LoRA."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=DIM // HEADS,
        text_dim=TEXT,
        ffn_dim=FFN,
        num_layers=LAYERS,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    ).requires_grad_(False)
    latents, timestep, text = inputs()

    def call() -> Tensor:
        return model(latents, timestep, text, return_dict=False)[0]

    if step_kind == "forward":
        return lambda: forward(call)
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    if step_kind == "checkpointed":
        model.enable_gradient_checkpointing()
        model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    return lambda: train(call, optimizer)


def forward(call: Callable[[], Tensor]) -> None:
    """Run one forward pass without gradients."""
    with torch.no_grad():
        call()


def train(call: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Run one LoRA training step."""
    torch.nn.functional.mse_loss(call(), torch.zeros(LATENTS)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


SIDES = {"ours": ours, "theirs": theirs}


def serve(build: Callable[[], Step], threads: int, pipe: Connection) -> None:
    """Build one side, then time a step for each request."""
    torch.set_num_threads(threads)
    step = build()
    step()
    step()
    pipe.send("ready")
    while pipe.recv() == "step":
        began = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - began)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(sides: Mapping[str, Callable[[], Step]], pairs: int, threads: int) -> dict[str, float | list[float]]:
    """Return the medians of both sides, the median ratio with a bootstrap interval, and both peaks of memory."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for side, build in sides.items():
        pipes[side], child = context.Pipe()
        context.Process(target=serve, args=(build, threads, child), daemon=True).start()
        pipes[side].recv()
    times: dict[str, list[float]] = {side: [] for side in sides}
    for index in range(pairs):
        for side in list(sides) if index % 2 else reversed(list(sides)):
            pipes[side].send("step")
            times[side].append(pipes[side].recv())
    peaks = {}
    for side, pipe in pipes.items():
        pipe.send("stop")
        peaks[side] = pipe.recv()
    ratios = [a / b for a, b in zip(times["ours"], times["theirs"], strict=True)]
    draws = random.Random(0)
    medians = sorted(statistics.median(draws.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {
        "ours_s": statistics.median(times["ours"]),
        "theirs_s": statistics.median(times["theirs"]),
        "ratio": statistics.median(ratios),
        "interval_95": [medians[50], medians[1949]],
        "rss_ratio": peaks["ours"] / peaks["theirs"],
        "ours_mib": peaks["ours"],
        "theirs_mib": peaks["theirs"],
    }


def modulation(size: tuple[int, int, int], dim: int = 3072) -> dict[str, object]:
    """Return MiB of modulation that a block reads for latents (F, H, W) of one sample with a timestep per frame."""
    from wan_train.models.dit.dit import Dit, DitConfig

    seen: list[int] = []
    with torch.device("meta"):
        model = Dit(DitConfig(dim, FFN, dim // 128, 1, in_dim=48, out_dim=48, text_dim=TEXT)).requires_grad_(False)
        model.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[2].nbytes))
        frames, height, width = size
        model(torch.empty(1, 48, *size), torch.empty(1, frames), torch.empty(1, 512, TEXT))
    tokens = frames * (height // 2) * (width // 2)
    whole = tokens * 6 * dim * torch.float32.itemsize
    return {"latents": size, "tokens": tokens, "modulation_mib": seen[0] / 2**20, "per_token_mib": whole / 2**20}


def main() -> None:
    """Print one line of JSON for each kind of step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kind", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--modulation", action="store_true")
    options = parser.parse_args()
    if options.modulation:
        for size in ((31, 16, 16), (31, 44, 80), (31, 88, 160), (61, 44, 80)):
            print(json.dumps(modulation(size)))
        return
    print(json.dumps({"machine": platform.processor() or platform.machine(), "torch": torch.__version__}))
    for kind in options.kind:
        sides = {side: partial(build, kind) for side, build in SIDES.items()}
        print(json.dumps({"kind": kind} | measure(sides, options.pairs, options.threads)), flush=True)


if __name__ == "__main__":
    main()
