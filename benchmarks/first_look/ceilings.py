"""What the device can do at best: matrix products, attention, and copies, alone and together.

Sizes are those of a 14B step at 832x480x81: 32,760 tokens of width 5,120 with 40 heads of 128.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.first_look.rows import Measured, NotHere, Row, Values
from benchmarks.first_look.timing import runtime_of, seconds_of
from wan_train.models.dit.attention import attention

PRODUCTS, ATTENTION = "ceiling/products bf16", "ceiling/attention bf16"


@dataclass(frozen=True)
class Sizes:
    """Numbers of tokens, width, feed-forward width and heads; bytes of a copy; calls of which the mean is taken."""

    tokens: int = 32760
    width: int = 5120
    inner: int = 13824
    heads: int = 40
    copied: int = 2**30
    repeats: int = 10


SMALL = Sizes(tokens=64, width=256, inner=512, heads=2, copied=2**20, repeats=2)


def ceiling_rows(device: torch.device, *, small: bool) -> list[Row]:
    """Return the rows of the ceilings."""
    sizes = SMALL if small else Sizes()
    measures: dict[str, Callable[[], Values]] = {
        PRODUCTS: partial(products, torch.bfloat16, sizes, device),
        ATTENTION: partial(attend, sizes, device),
        "ceiling/copies": partial(copies, sizes, device),
        "ceiling/products fp8": partial(fp8_products, sizes, device),
        "ceiling/products int8": partial(int8_products, sizes, device),
        "ceiling/products float32": partial(products, torch.float32, sizes, device),
    }
    return [Row(name, 8.0, partial(_measure, call)) for name, call in measures.items()]


def _measure(call: Callable[[], Values], earlier: Mapping[str, Values]) -> Measured:
    return Measured(call())


def _shapes(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Return (in, out) of a block's products, by a name for the table."""
    return {"square": (sizes.width, sizes.width), "up": (sizes.width, sizes.inner), "down": (sizes.inner, sizes.width)}


def products(dtype: torch.dtype, sizes: Sizes, device: torch.device) -> Values:
    """Return TFLOP/s of x W^T for each shape of a block's matrices, and of all three together."""

    def make(width: int, out: int) -> Callable[[], Tensor]:
        x = torch.randn(sizes.tokens, width, device=device, dtype=dtype)
        weight = torch.randn(out, width, device=device, dtype=dtype)
        return lambda: F.linear(x, weight)

    return _rates(make, sizes, device)


def fp8_products(sizes: Sizes, device: torch.device) -> Values:
    """The same of fp8 products with a scale per row of both sides, bfloat16 out."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise NotHere("fp8 products need a GPU of compute capability 8.9 or higher")

    def make(width: int, out: int) -> Callable[[], Tensor]:
        x = torch.randn(sizes.tokens, width, device=device).to(torch.float8_e4m3fn)
        weight = torch.randn(out, width, device=device).to(torch.float8_e4m3fn)
        scales = torch.ones(sizes.tokens, 1, device=device), torch.ones(1, out, device=device)
        return lambda: torch._scaled_mm(x, weight.t(), *scales, out_dtype=torch.bfloat16)

    return _rates(make, sizes, device)


def int8_products(sizes: Sizes, device: torch.device) -> Values:
    """The same of int8 products, int32 out."""

    def make(width: int, out: int) -> Callable[[], Tensor]:
        x = torch.randint(-127, 128, (sizes.tokens, width), device=device, dtype=torch.int8)
        weight = torch.randint(-127, 128, (out, width), device=device, dtype=torch.int8)
        return lambda: torch._int_mm(x, weight.t())

    return _rates(make, sizes, device)


def _rates(make: Callable[[int, int], Callable[[], Tensor]], sizes: Sizes, device: torch.device) -> Values:
    rates: Values = {}
    work = seconds = 0.0
    for name, (width, out) in _shapes(sizes).items():
        flops = 2.0 * sizes.tokens * width * out
        took = seconds_of(make(width, out), device, repeats=sizes.repeats, warm_up=2)
        rates[f"{name}_tflops"] = flops / took / 1e12
        work, seconds = work + flops, seconds + took
    return {"tflops": work / seconds / 1e12} | rates


def attend(sizes: Sizes, device: torch.device) -> Values:
    """Return TFLOP/s of self-attention, forward and backward, with the model's own choice of kernel."""
    dtype, head_width = torch.bfloat16, sizes.width // sizes.heads
    call = attention("torch", device=device, dtype=dtype, training=True, head_width=head_width)
    shape = (1, sizes.tokens, sizes.heads, head_width)
    parts = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    flops = 4.0 * sizes.tokens**2 * sizes.width
    with torch.no_grad():
        forward = seconds_of(lambda: call(*parts), device, repeats=sizes.repeats, warm_up=2)
    out = call(*parts)
    gradient = torch.randn_like(out)
    back = partial(torch.autograd.grad, out, parts, gradient, retain_graph=True)
    backward = seconds_of(back, device, repeats=sizes.repeats, warm_up=2)
    # Five products of the size of the forward pass's two (Dao 2023, section 3).
    return {"tflops": flops / forward / 1e12, "backward_tflops": 2.5 * flops / backward / 1e12}


def copies(sizes: Sizes, device: torch.device) -> Values:
    """Return GiB/s of pinned copies up and down, alone and at once, and how much they slow products down."""
    pinned, runtime = device.type != "cpu", runtime_of(device)
    hosts = [torch.empty(sizes.copied, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
    held = [torch.empty(sizes.copied, dtype=torch.uint8, device=device) for _ in range(2)]
    queues = [runtime.Stream() for _ in range(2)]
    runtime.synchronize()  # the other streams may use what this one has allocated

    def up() -> None:
        with runtime.stream(queues[0]):
            held[0].copy_(hosts[0], non_blocking=True)

    def down() -> None:
        with runtime.stream(queues[1]):
            hosts[1].copy_(held[1], non_blocking=True)

    def both() -> None:
        up()
        down()

    rate = {name: _gib_per_second(call, sizes, device) for name, call in {"up": up, "down": down, "both": both}.items()}
    x = torch.randn(sizes.tokens, sizes.width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(sizes.width, sizes.width, device=device, dtype=torch.bfloat16)
    multiply = partial(F.linear, x, weight)
    alone = seconds_of(multiply, device, repeats=sizes.repeats, warm_up=2)
    slowed = _beside(multiply, both, sizes.repeats, device)
    return {f"{name}_gib_s": value for name, value in rate.items()} | {"products_slowed": slowed / alone}


def _gib_per_second(call: Callable[[], None], sizes: Sizes, device: torch.device) -> float:
    """Return the rate of one direction; for both at once, of each."""
    return sizes.copied / 2**30 / seconds_of(call, device, repeats=sizes.repeats)


def _beside(call: Callable[[], Tensor], copy: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Return the seconds of one call of `repeats` on the current stream while copies run on others."""
    runtime = runtime_of(device)
    runtime.synchronize()
    for _ in range(repeats):
        copy()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type != "cpu":  # there every call has ended
        runtime.current_stream().synchronize()
    took = (time.perf_counter() - began) / repeats
    runtime.synchronize()
    return took
