"""Small programs for the simulated device: each has one fault, or none, and says what is to be seen of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.device.simulated.device import SimulatedCuda

DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Probe:
    """A program, and a part of the only fault that is seen of it; empty if there is none."""

    run: Callable[[], object]
    expected: str = ""


def see(probe: Probe) -> list[str]:
    """Run a program on a device of its own; return what was found and what it raised."""
    with SimulatedCuda() as cuda:
        raised = []
        try:
            probe.run()
        except (RuntimeError, TypeError) as problem:
            raised = [str(problem)]
    return [*raised, *cuda.findings]


def _near(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*shape, dtype=dtype, device=DEVICE)


def _pinned(size: int) -> Tensor:
    return torch.ones(size).pin_memory()


def upload(*, wait: bool, pinned: bool = True, record: bool = True) -> Tensor:
    """Copy to the device on a stream of its own, and compute with it on the default stream."""
    copies = torch.cuda.Stream()
    source, target = _pinned(8) if pinned else torch.ones(8), _near(8)
    copies.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(copies):
        target.copy_(source, non_blocking=True)
        done = copies.record_event()
    if record:
        target.record_stream(copies)
    if wait:
        torch.cuda.current_stream().wait_event(done)
        return target + 1
    return target + 1 if record else source


def overwrite_too_early(*, wait: bool) -> None:
    """Copy from the device on a stream of its own, and overwrite the source on the default stream."""
    copies, source, target = torch.cuda.Stream(), _near(8), torch.empty(8).pin_memory()
    copies.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(copies):
        target.copy_(source, non_blocking=True)
    if wait:
        torch.cuda.current_stream().wait_stream(copies)
    source.zero_()
    torch.cuda.current_stream().wait_stream(copies)


def read_on_the_host(*, wait: bool) -> list[float]:
    """Read what is being copied to pinned memory."""
    target = torch.empty(8).pin_memory()
    target.copy_(_near(8), non_blocking=True)
    if wait:
        torch.cuda.current_stream().synchronize()
    return target.tolist()


def draw(generator_device: str) -> Tensor:
    return torch.randn(4, device=DEVICE, generator=torch.Generator(generator_device))


def multiply_int8(rows: int) -> Tensor:
    return torch._int_mm(_near(rows, 16, dtype=torch.int8), _near(16, 16, dtype=torch.int8))


def multiply_fp8(*, contiguous: bool, out: torch.dtype) -> Tensor:
    codes, scales = _near(32, 32).to(torch.float8_e4m3fn), _near(32, 1)
    columns = scales.t().contiguous() if contiguous else _near(1, 1).expand(1, 32)
    return torch._scaled_mm(codes, codes.t(), scales, columns, out_dtype=out)


def attend(width: int, dtype: torch.dtype) -> Tensor:
    query = _near(1, 2, 8, width, dtype=dtype)
    return F.scaled_dot_product_attention(query, query, query)


def train_in_autograd(device: str) -> None:
    """A step with a recomputed block: numbers must be those of the CPU."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 8) for _ in range(2)]
    x = torch.randn(4, 8)
    near = x.to(device).requires_grad_()
    for layer in layers:
        layer.to(device)
        near = torch.utils.checkpoint.checkpoint(layer, near, use_reentrant=False).sin()
    near.sum().backward()
    far = x
    with torch.no_grad():
        weights = [layer.weight.cpu() for layer in layers]
        for weight, layer in zip(weights, layers, strict=True):
            far = (far @ weight.t() + layer.bias.cpu()).sin()
    if not torch.allclose(far, near.detach().cpu(), atol=1e-6) or layers[0].weight.grad is None:
        raise RuntimeError("other numbers than the CPU's")


BF16, HALF = torch.bfloat16, torch.float16
PROBES: dict[str, Probe] = {
    "a step of training": Probe(lambda: train_in_autograd("cuda")),
    "an upload that is waited for": Probe(lambda: upload(wait=True)),
    "an upload that is not waited for": Probe(lambda: upload(wait=False), "race: aten::add"),
    "memory freed while a copy writes it": Probe(lambda: upload(wait=False, record=False), "freed early"),
    "a pageable upload": Probe(lambda: upload(wait=True, pinned=False), "pageable copy"),
    "a source that waits for its copy": Probe(lambda: overwrite_too_early(wait=True)),
    "a source that is overwritten": Probe(lambda: overwrite_too_early(wait=False), "race: aten::zero_"),
    "a copy that the host waits for": Probe(lambda: read_on_the_host(wait=True)),
    "a copy that the host does not wait for": Probe(lambda: read_on_the_host(wait=False), "race: tolist on host"),
    "a generator of the device": Probe(lambda: draw("cuda")),
    "a generator of the CPU": Probe(lambda: draw("cpu"), "Expected a 'cuda' device type for generator"),
    "tensors of two devices": Probe(lambda: _near(4) + torch.ones(4), "found at least two devices"),
    "a matrix of another dtype": Probe(lambda: F.linear(_near(4, 4, dtype=BF16), _near(4, 4)), "dtype"),
    "an integer product": Probe(lambda: _near(4, 4, dtype=torch.int8) @ _near(4, 4, dtype=torch.int8), "no CUDA"),
    "numpy of the device": Probe(lambda: _near(4).numpy(), "can't convert cuda:0"),
    "few rows in int8": Probe(lambda: multiply_int8(16), "greater than 16"),
    "enough rows in int8": Probe(lambda: multiply_int8(24)),
    "an fp8 product": Probe(lambda: multiply_fp8(contiguous=True, out=BF16)),
    "an fp8 product in float16": Probe(lambda: multiply_fp8(contiguous=True, out=HALF), "bfloat16 results only"),
    "an fp8 product with strided scales": Probe(lambda: multiply_fp8(contiguous=False, out=BF16), "contiguous"),
    "fp8 arithmetic": Probe(lambda: _near(4).to(torch.float8_e4m3fn).abs(), "fp8 operator"),
    "flash attention": Probe(lambda: attend(64, BF16)),
    "attention of an odd width": Probe(lambda: attend(7, torch.float32), "math attention"),
}
