"""Measure seconds per sampling step, ours against diffusers' WanPipeline: noise to latents, guided (two passes).

As in step.py each side runs in its own process and the two take turns; whole runs of a few steps are timed, including
the choice of noise levels, guidance and the solver. `batched` is our `--cfg_merge`: both passes as one batch.

    python benchmarks/sampling.py [--pairs 9] [--threads 2] [--kind guided batched]

With a CUDA device, the whole 1.3B and 14B with random bfloat16 weights at 480x832x81, and the throughput as a share of
that of a large bfloat16 matrix product on the same GPU in the same run:

    python benchmarks/sampling.py --gpu [--models 1.3B 14B] [--rounds 3]

Step caches on the small built-in model, 100 captions not seen in its training (see step_caches.py):

    python benchmarks/sampling.py --caches [--captions 100] [--calibrated 4]
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from memory import random_weights
from step import DIM, FFN, HEADS, LATENTS, LAYERS, TEXT, Step, measure
from step_caches import measure_caches
from torch import Tensor

from wan_train.conditions.conditions import Conditions
from wan_train.models.dit.dit import Dit, DitConfig
from wan_train.models.variants import TEXT_LENGTH
from wan_train.sampling.denoise import sample_latents
from wan_train.sampling.request import SampleRequest

STEPS, GUIDANCE, SHIFT = 4, 5.0, 5.0
SLICE = (LATENTS[4] * 8, LATENTS[3] * 8, 4 * LATENTS[2] - 3)  # width, height and frames of the latents of step.py
WHOLE = (832, 480, 81)
KINDS = ("guided", "batched")
MODELS = {"1.3B": DitConfig(DIM, FFN, HEADS, 30), "14B": DitConfig(5120, 13824, 40, 40)}
GEMM_SIDE = 8192


def request(size: tuple[int, int, int], *, merge: bool = False) -> SampleRequest:
    """Return a guided run of STEPS steps at (width, height, frames)."""
    width, height, frames = size
    return SampleRequest("", "", width, height, frames, STEPS, GUIDANCE, SHIFT, seed=0, cfg_merge=merge)


def texts() -> tuple[Tensor, Tensor]:
    """Return embeddings (512, TEXT) of a prompt and a negative prompt."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(TEXT_LENGTH, TEXT, generator=generator) for _ in range(2))
    return first, second


def our_run(model: Dit, wanted: SampleRequest, device: torch.device) -> Step:
    """Return a run from noise to latents, as in previews and the generator."""
    positive, negative = (Conditions((rows,)) for rows in texts())
    return lambda: finite(sample_latents(model, wanted, positive, negative, device=device, quiet=True))


def finite(latents: Tensor) -> None:
    """Raise an error for NaN or Inf: an overflowing model could be faster."""
    assert latents.isfinite().all()


def ours(step_kind: str) -> Step:
    """Return our sampler with the slice of the 1.3B."""
    torch.manual_seed(0)
    model = Dit(DitConfig(DIM, FFN, HEADS, LAYERS, text_dim=TEXT)).requires_grad_(False)
    return our_run(model, request(SLICE, merge=step_kind == "batched"), torch.device("cpu"))


def theirs(step_kind: str) -> Step:
    """Return diffusers' pipeline with the slice of the 1.3B, from embeddings to latents; the same for both kinds."""
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=DIM // HEADS, text_dim=TEXT, ffn_dim=FFN, num_layers=LAYERS
    ).requires_grad_(False)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    pipeline = WanPipeline(None, None, None, scheduler, model)
    pipeline.set_progress_bar_config(disable=True)
    width, height, frames = SLICE
    positive, negative = (rows[None] for rows in texts())

    def run() -> None:
        made = pipeline(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            width=width,
            height=height,
            num_frames=frames,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames
        assert made.shape == LATENTS
        finite(made)

    return run


def compare(step_kind: str, pairs: int, threads: int) -> dict[str, object]:
    """Return the results of step.py's `measure`, in seconds per sampling step."""
    found = measure({"ours": partial(ours, step_kind), "theirs": partial(theirs, step_kind)}, pairs, threads)
    return {"kind": step_kind, "steps": STEPS} | {
        name: value / STEPS if name in ("ours_s", "theirs_s") and isinstance(value, float) else value
        for name, value in found.items()
    }


def random_model(config: DitConfig, device: torch.device) -> Dit:
    """Return a DiT of random bfloat16 weights, as `load_dit` would build it from a file."""
    from wan_train.models.loading import Placement, build_dit, set_attention
    from wan_train.storage import Header

    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in Dit(config).state_dict().items()}
    header = Header(shapes, dict.fromkeys(shapes, torch.bfloat16), {})
    model = build_dit(header, random_weights(shapes, device), source={}, placement=Placement(device))
    set_attention(model, "torch", device=device)
    return model


def pass_flops(config: DitConfig, size: tuple[int, int, int]) -> float:
    """Return the floating-point operations of the products in one pass: two per weight and token, and four times the
    width for each pair of tokens in attention (scores and weighted sums)."""
    width, height, frames = size
    video, dim = (1 + (frames - 1) // 4) * (height // 16) * (width // 16), config.dim
    block = video * (6 * dim * dim + 2 * dim * config.ffn_dim)  # q, k, v, o; q, o of the text; feed-forward
    block += TEXT_LENGTH * 2 * dim * dim  # k, v of the text
    block += 2 * dim * video * (video + TEXT_LENGTH)
    patch = config.in_dim * 4 * dim
    ends = 2 * video * patch + TEXT_LENGTH * dim * (config.text_dim + dim)
    return 2.0 * (config.num_layers * block + ends)


def gemm_ceiling(device: torch.device, side: int = GEMM_SIDE) -> float:
    """Return floating-point operations per second of square bfloat16 matrix products, the median of ten times ten."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> None:
        for _ in range(10):
            product = a @ b
        product[0, 0].item()  # waits for the device

    return 10 * 2 * side**3 / statistics.median(timed(multiply, 10))


def timed(run: Callable[[], None], rounds: int) -> list[float]:
    """Return the seconds of each round, after a warm-up round."""
    run()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return seconds


def measure_whole(names: list[str], rounds: int, device: torch.device) -> Iterator[dict[str, object]]:
    """Yield, for each model, seconds per step and the share of the GPU's matrix product throughput."""
    ceiling = gemm_ceiling(device)
    yield {"gemm_tflops": ceiling / 1e12}
    for name in names:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            # The latents are copied to CPU RAM, so that a run ends when the device has finished.
            seconds = timed(our_run(random_model(MODELS[name], device), request(WHOLE), device), rounds)
        except torch.OutOfMemoryError:
            yield {"model": name, "failed": "out of memory"}
            continue
        step, flops = statistics.median(seconds) / STEPS, 2 * pass_flops(MODELS[name], WHOLE)
        yield {
            "model": name,
            "size": WHOLE,
            "s_per_step": step,
            "tflop_per_step": flops / 1e12,
            "share_of_gemm": flops / step / ceiling,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }


def main() -> None:
    """Print one line of JSON for each kind of run or, with --gpu, each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kind", nargs="+", default=["guided"], choices=KINDS)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--caches", action="store_true")
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--calibrated", type=int, default=4, help="videos to calibrate on")
    options = parser.parse_args()
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device, and torch sees none")
    machine = torch.cuda.get_device_name() if options.gpu else platform.processor() or platform.machine()
    print(json.dumps({"machine": machine, "torch": torch.__version__}), flush=True)
    if options.caches:
        lines = measure_caches(options.captions, options.calibrated)
    elif options.gpu:
        lines = measure_whole(options.models, options.rounds, torch.device("cuda"))
    else:
        lines = (compare(kind, options.pairs, options.threads) for kind in options.kind)
    for line in lines:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
