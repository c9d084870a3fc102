"""Seconds and memory of a 14B LoRA step at 832x480x81, by mode, and the share of the measured ceilings reached."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.first_look.ceilings import ATTENTION, PRODUCTS
from benchmarks.first_look.models import TINY, Geometry, Mode, build
from benchmarks.first_look.modes import MODES, RECOMPUTED
from benchmarks.first_look.rows import Measured, NotHere, Options, Row, Values
from benchmarks.first_look.stepping import NUM_TEXT_TOKENS, batch, make_stepper
from benchmarks.first_look.timing import runtime_of, seconds_of
from wan_train.placement.settings import CompileSettings

FORWARD = "speed/forward"
# By row: the mode, and an estimate in seconds on a fast GPU with 40 blocks: to build, to warm up, to time one step.
STEPS: dict[str, tuple[Mode, float]] = {
    "speed/resident": (Mode(activations=RECOMPUTED), 60.0),
    "speed/keep_attention": (MODES["keep_attention"], 55.0),
    "speed/streamed": (MODES["streamed"], 90.0),
    "speed/fp8": (replace(MODES["fp8"], activations=RECOMPUTED), 60.0),
    "speed/int8": (replace(MODES["int8"], activations=RECOMPUTED), 60.0),
    "speed/compile": (MODES["compile"], 120.0),
}
BACKWARD_OF_ATTENTION = 2.5  # times the work of its forward pass
# GiB at the true size that do not depend on the number of blocks: what one block needs while it is recomputed, the
# embeddings, the latents; 61.9 GiB in all were counted for 40 blocks with full recomputation.
FIXED_GIB = 12.0
USABLE = 0.94  # share of the free memory


@dataclass(frozen=True)
class Passes:
    """How often a step computes each block's products and attention, and its attention's backward pass."""

    products: int = 3  # forward, recomputed, gradients of the inputs; the weights are frozen
    attention: int = 2
    backward: int = 1


def speed_rows(device: torch.device, options: Options) -> list[Row]:
    """Return the rows of the table, in order of worth."""
    geometry = TINY if options.small else Geometry()
    rows = []
    for name, (mode, seconds) in STEPS.items():
        if options.small and mode.compile.compile:
            mode = replace(mode, compile=CompileSettings(compile=True, compile_backend="eager"))
        passes = Passes(attention=1) if mode.activations.recompute == "keep_attention" else Passes()
        call = partial(step, mode, geometry, passes, device)
        rows.append(Row(name, seconds, partial(_fitting, call, mode, geometry, options.blocks, device)))
    forward_mode = Mode()
    call = partial(forward, forward_mode, geometry, device)
    return [*rows, Row(FORWARD, 25.0, partial(_fitting, call, forward_mode, geometry, options.blocks, device))]


def _fitting(
    call: Callable[[int, Mapping[str, Values]], Values],
    mode: Mode,
    geometry: Geometry,
    wanted: int | None,
    device: torch.device,
    earlier: Mapping[str, Values],
) -> Measured:
    """Measure with the wanted number of blocks, or with as many as fit: fewer after each failed allocation."""
    layers = wanted or fitting_blocks(mode, geometry, _free_bytes(device))
    while layers >= 2:
        try:
            return Measured({"blocks": layers, "tokens": geometry.tokens} | call(layers, earlier))
        except torch.OutOfMemoryError:
            pass  # outside of this clause, so that the failed call's tensors are freed
        if wanted:
            break
        gc.collect()
        torch.cuda.empty_cache()
        layers = layers * 3 // 4
    raise NotHere(f"not enough memory on {device} for {max(layers, 2)} blocks")


def _free_bytes(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def fitting_blocks(mode: Mode, geometry: Geometry, free: int | None) -> int:
    """Return the number of blocks, at least 2, whose weights and kept activations fit in `free` bytes; all if None."""
    if free is None:
        return geometry.layers
    kept = 4 * geometry.tokens * geometry.dim  # a block's input, float32
    if mode.activations.recompute == "keep_attention":
        kept += 2 * 2 * geometry.tokens * geometry.dim  # two results of attention, bfloat16
    narrow = mode.weights.fp8_base or mode.weights.int8_base
    matrices = 0 if mode.streamed else products_of(geometry) * (1 if narrow else 2)
    fixed = FIXED_GIB * 2**30 * geometry.tokens / Geometry().tokens
    return int(max(2, min(geometry.layers, (USABLE * free - fixed) // (kept + matrices))))


def products_of(geometry: Geometry) -> int:
    """Return the number of elements of a block's matrices: eight of attention and two of the feed-forward."""
    return 8 * geometry.dim**2 + 2 * geometry.dim * geometry.ffn


def step(
    mode: Mode, geometry: Geometry, passes: Passes, device: torch.device, layers: int, earlier: Mapping[str, Values]
) -> Values:
    """Return the seconds of one LoRA step after one to warm up, and its peak of memory."""
    built = build(mode, geometry, layers=layers, device=device, drawn_on=device)
    stepper = make_stepper(mode, built, device)
    _forget_peak(device)
    took = seconds_of(lambda: stepper.step(geometry, 0, device), device)
    return _values(took, layers, device) | share(took / layers, geometry, passes, earlier)


def forward(mode: Mode, geometry: Geometry, device: torch.device, layers: int, earlier: Mapping[str, Values]) -> Values:
    """Return the seconds of one forward pass without gradients after one to warm up."""
    model = build(mode, geometry, layers=layers, device=device, drawn_on=device).model.eval()
    latents, conditions, _ = batch(geometry, 0, device)
    timestep = torch.tensor([500.0], device=device)
    _forget_peak(device)
    with torch.no_grad():
        took = seconds_of(lambda: model(latents, timestep, **conditions.inputs()), device)
    return _values(took, layers, device) | share(took / layers, geometry, Passes(1, 1, 0), earlier)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        runtime_of(device).reset_peak_memory_stats(device)


def _values(took: float, layers: int, device: torch.device) -> Values:
    values: Values = {"seconds": took, "seconds_40_blocks": took / layers * 40}
    if device.type == "cuda":
        values["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return values


def share(seconds: float, geometry: Geometry, passes: Passes, earlier: Mapping[str, Values]) -> Values:
    """Return the share of the ceilings: the time of a block's products and attention at the measured bf16 rates over
    the `seconds` of a block; nothing if a ceiling is unknown. LoRA's own products are not counted."""
    rates = [earlier.get(row, {}).get(name) for row, name in _RATES]
    if None in rates:
        return {}
    products, attention, backward = (1e12 * float(rate) for rate in rates if rate is not None)
    tokens, dim = geometry.tokens, geometry.dim
    of_text = 2 * dim**2  # the matrices that the text's keys and values come from
    work = 2.0 * (tokens * (products_of(geometry) - of_text) + NUM_TEXT_TOKENS * of_text)
    scores = 4.0 * tokens * (tokens + NUM_TEXT_TOKENS) * dim
    ideal = passes.products * work / products + passes.attention * scores / attention
    ideal += passes.backward * BACKWARD_OF_ATTENTION * scores / backward
    return {"share_of_ceiling": ideal / seconds}


_RATES = ((PRODUCTS, "tflops"), (ATTENTION, "tflops"), (ATTENTION, "backward_tflops"))
