"""Faults put into the product on purpose: the simulated device must see each of them in the case that is named."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.device.simulated.runtime import Patch
from wan_train import precision
from wan_train.models.dit import dit
from wan_train.models.dit.rope import rope_table
from wan_train.placement import offload
from wan_train.placement.lanes import AcceleratorLane
from wan_train.quantization import schemes
from wan_train.training.objective.loss import Draws
from wan_train.training.optimizing import rounding

STREAMED = "train t2v, all blocks streamed"
TRAINED = "train all weights, streamed both ways"
PARKED = "train A14B, expert offloaded"
PRODUCTS = "generate fun-camera, fp8 products"


@dataclass(frozen=True)
class Mutant:
    """A fault: the case that it is put into, what is replaced, and a part of what is to be seen."""

    case: str
    patch: Callable[[], Patch]
    seen: str


def _upload_at_once(self: Any, target: Tensor, source: Tensor, after: object) -> object:
    with self._runtime.stream(self._copies):
        target[: len(source)].copy_(source, non_blocking=True)
    return self._copies.record_event()


def _upload_blocking_nothing(self: Any, target: Tensor, source: Tensor, after: object) -> object:
    self._copies.wait_event(after)
    with self._runtime.stream(self._copies):
        target[: len(source)].copy_(source, non_blocking=True)
    return self._runtime.Event()  # of no stream


def _host_unpinned(self: Any, num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def _leave_at_once(self: Any) -> None:
    self._near = None


def _take_at_once(self: Any) -> Tensor:
    self.fetch()
    near, self._near = self._near, None
    return near


def _rope_on_host(grid: Any, head_dim: int, *, device: torch.device, **others: Any) -> Tensor:
    return rope_table(grid, head_dim, device=torch.device("cpu"), **others)


def _draws_without_noise(self: Draws, device: torch.device) -> Draws:
    return replace(self, t=self.t.to(device))


def _bias_as_stored(self: Any, x: Tensor) -> Tensor:
    if self.weight.dtype == x.dtype or self.weight.requires_grad:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias)
    return precision.FrozenProduct.apply(x, self.weight, self.scale_weight, self.bias)


def _fp8_product() -> Patch:
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        tokens, steps = schemes._rounded_rows(x, 448.0, schemes._to_fp8)
        columns = scale.view(-1, 1).expand(len(weight), 1).t().contiguous()
        y = torch._scaled_mm(tokens, weight.t(), steps, columns, out_dtype=torch.float32)
        y = y.to(x.dtype).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias

    return schemes._Fp8Product, "forward", staticmethod(forward)


def _host_generator() -> Patch:
    draw = rounding.round_stochastically

    def rounded(x: Tensor, generator: torch.Generator) -> Tensor:
        return draw(x, torch.Generator().manual_seed(0))

    return rounding, "round_stochastically", rounded


def _product_outside_of_fp8() -> Patch:
    def widened(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        return (weight * 1 if scale is None else weight).to(dtype)

    return precision, "widened", widened


MUTANTS: dict[str, Mutant] = {
    "the host keeps the rope table": Mutant(
        "train t2v, float32", lambda: (dit, "rope_table", _rope_on_host), "same device"
    ),
    "an upload does not wait for the block before": Mutant(
        STREAMED, lambda: (AcceleratorLane, "upload", _upload_at_once), "race"
    ),
    "a block does not wait for its upload": Mutant(
        STREAMED, lambda: (AcceleratorLane, "wait", lambda self, mark: None), "race"
    ),
    "an upload's event is of no stream": Mutant(
        STREAMED, lambda: (AcceleratorLane, "upload", _upload_blocking_nothing), "race"
    ),
    "host copies are not pinned": Mutant(STREAMED, lambda: (AcceleratorLane, "host", _host_unpinned), "pageable"),
    "an activation is freed while it is copied": Mutant(
        "train i2v, activations offloaded", lambda: (offload.Kept, "leave", _leave_at_once), "freed early"
    ),
    "an activation is taken before it has come": Mutant(
        "train i2v, activations offloaded", lambda: (offload.Kept, "take", _take_at_once), "race"
    ),
    "host copies are read before they are complete": Mutant(
        TRAINED, lambda: (AcceleratorLane, "finish", lambda self: None), "race"
    ),
    "an expert is used before it has come": Mutant(
        PARKED, lambda: (AcceleratorLane, "wait", lambda self, mark: None), "race"
    ),
    "stochastic rounding draws on the host": Mutant(TRAINED, _host_generator, "device type for generator"),
    "the noise stays on the host": Mutant(
        "train t2v, float32", lambda: (Draws, "to", _draws_without_noise), "same device"
    ),
    "a bias keeps its dtype": Mutant(
        "train t2v, float32", lambda: (precision.Linear, "forward", _bias_as_stored), "dtype"
    ),
    "an fp8 product in float32": Mutant(PRODUCTS, _fp8_product, "bfloat16 results only"),
    "int8 rows are not padded": Mutant(
        "train flf2v, int8", lambda: (schemes, "_padded", lambda tokens: tokens), "greater than 16"
    ),
    "arithmetic in fp8": Mutant("train ti2v, fp8", _product_outside_of_fp8, "fp8 operator"),
}
