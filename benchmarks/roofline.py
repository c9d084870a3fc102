"""Count FLOPs, memory traffic and kernels of a DiT pass and of LoRA steps at true size, for ours and diffusers + peft.

Models are on the meta device: no GPU, no weights. The counts become seconds by stated rates of a device; what a device
adds (imperfect overlap, allocations, kernels' own efficiency) is not modelled.

    python benchmarks/roofline.py [--kind forward lora recomputed keep_attention] [--side ours unfused theirs]
        [--operators 10]

A test compares our counts with tests/golden/counts.json. This stores those that fell there, and names those that rose,
which are changed in the file by hand if they should be:

    python benchmarks/roofline.py --record

The geometry is that of the 14B model with latents of an 81-frame 832x480 video, bfloat16 and rank 32. Rope tables are
counted as made, because a device makes them once per size.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.counting import Counting, Counts, flash_attention
from benchmarks.step import TARGETS

DIM, FFN, HEADS, TEXT = 5120, 13824, 40, 4096
LATENTS = (1, 16, 21, 60, 104)
GRID = (21, 30, 52)
RANK, LAYERS = 32, 4
STORED = Path(__file__).resolve().parents[1] / "tests" / "golden" / "counts.json"
KINDS = ("forward", "lora", "recomputed", "keep_attention")

Call = Callable[[], Tensor]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, timestep and text on the meta device."""
    with torch.device("meta"):
        return torch.empty(LATENTS), torch.empty(1), torch.empty(1, 512, TEXT, dtype=torch.bfloat16)


def ours(step_kind: str, num_layers: int, counting: Counting, *, fused: bool = True) -> Call:
    """Return a pass of our DiT, plain or with our LoRA; with `fused` kernels, or as with `--no_fused_kernels`."""
    from networks.adapter import create
    from networks.settings import NetworkSettings
    from wan_train.fusing import set_kernels
    from wan_train.models.dit.dit import Dit, DitConfig
    from wan_train.models.dit.fused import PURE
    from wan_train.models.dit.rope import rope_table
    from wan_train.placement.recompute import apply_recompute
    from wan_train.placement.settings import RecomputeSettings

    device = torch.device("meta")
    with device:
        model = Dit(DitConfig(DIM, FFN, HEADS, num_layers, text_dim=TEXT)).requires_grad_(False).to(torch.bfloat16)
    model.compute_dtype = torch.bfloat16
    if step_kind != "forward":
        create(model, NetworkSettings(network_dim=RANK, network_alpha=RANK), seed=0)
        model.to(device)
    if fused:
        set_kernels(model.blocks, PURE.each(counting.as_one_kernel))
    modes = {"recomputed": "full", "keep_attention": "keep_attention"}
    if step_kind in modes:
        apply_recompute(model.blocks, RecomputeSettings(recompute=modes[step_kind]), device)
    latents, timestep, text = inputs()
    table = rope_table(GRID, DIM // HEADS, device=device)

    def call() -> Tensor:
        with patch("wan_train.models.dit.dit.rope_table", return_value=table):
            return model(latents, timestep, text)

    return call


def theirs(step_kind: str, num_layers: int, counting: Counting) -> Call:
    """Return a pass of diffusers' WanTransformer3DModel, plain or with peft's LoRA; it has no `keep_attention`."""
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig

    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=DIM // HEADS,
            text_dim=TEXT,
            ffn_dim=FFN,
            num_layers=num_layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
        ).requires_grad_(False)
        _cast(model)
        if step_kind != "forward":
            model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
    if step_kind == "recomputed":
        model.enable_gradient_checkpointing()
        model.train()
    latents, timestep, text = inputs()
    half = latents.to(torch.bfloat16)
    return lambda: model(half, timestep, text, return_dict=False)[0]


def _cast(model: nn.Module) -> None:
    """Cast to bfloat16 all but the parameters that diffusers keeps in float32."""
    kept = model._keep_in_fp32_modules
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(torch.bfloat16)


SIDES = {"ours": ours, "unfused": partial(ours, fused=False), "theirs": theirs}


def count(side: str, step_kind: str, num_layers: int = LAYERS) -> Counts:
    """Return the counts of one pass (`forward`), or of one step up to its gradients, with the loss read."""
    counting = Counting()
    call = SIDES[side](step_kind, num_layers, counting)
    with flash_attention(), counting:
        if step_kind == "forward":
            with torch.no_grad():
                call()
        else:
            loss = call().float().square().mean()
            loss.backward()
            loss.item()
    return counting.counts


def kernels_per_block(side: str, step_kind: str) -> int:
    """Return the kernels that a further block adds, neither the first nor the last one."""
    few, many = (count(side, step_kind, num_layers).kernels for num_layers in (LAYERS - 1, LAYERS))
    return many - few


def stored_counts(step_kind: str) -> dict[str, float]:
    """Return our counts that a test holds."""
    counts = count("ours", step_kind)
    return {
        "flops": counts.flops,
        "elementwise_bytes": counts.elementwise_bytes,
        "kernels": counts.kernels,
        "kernels_per_block": kernels_per_block("ours", step_kind),
        "copies": counts.copies,
        "waits": counts.waits,
    }


def record(path: Path = STORED) -> None:
    """Store our counts that fell or are new, and print those that rose and are therefore left."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    for step_kind in KINDS:
        before = stored.setdefault(step_kind, {})
        for name, number in stored_counts(step_kind).items():
            if number > before.get(name, number):
                print(f"{step_kind} {name} rose from {before[name]} to {number}: not stored")
            else:
                before[name] = number
    path.write_text(json.dumps(stored, indent=1) + "\n")


def summary(side: str, step_kind: str, num_operators: int) -> dict[str, object]:
    """Return the counts for a line of JSON, with the operators that move most bytes."""
    counts = count(side, step_kind)
    result: dict[str, object] = {
        "kind": step_kind,
        "side": side,
        "seconds": round(counts.total_seconds, 4),
        **{name.replace(" ", "_") + "_s": round(seconds, 4) for name, seconds in counts.seconds.items()},
        "tflop": round(counts.flops / 1e12, 1),
        "elementwise_gb": round(counts.elementwise_bytes / 1e9, 1),
        "kernels": counts.kernels,
        "kernels_per_block": kernels_per_block(side, step_kind),
        "copies": counts.copies,
        "waits": counts.waits,
    }
    if num_operators:
        most = counts.bytes_by_operator.most_common(num_operators)
        result["gb_by_operator"] = {name: round(num_bytes / 1e9, 1) for name, num_bytes in most}
    return result


def main() -> None:
    """Print one line of JSON for each kind of step and side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--side", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--operators", type=int, default=0, help="number of operators to list, by bytes")
    parser.add_argument("--record", action="store_true", help="store our counts that fell")
    options = parser.parse_args()
    if options.record:
        record()
        return
    for step_kind in options.kind:
        for side in options.side:
            if (side, step_kind) != ("theirs", "keep_attention"):
                print(json.dumps(summary(side, step_kind, options.operators)), flush=True)


if __name__ == "__main__":
    main()
