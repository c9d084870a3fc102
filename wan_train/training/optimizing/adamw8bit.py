"""AdamW with 8-bit states in plain tensor operations, for every device and for stochastic rounding of weights.

Each state is quantised block-wise: blocks of 256 elements share a float32 scale, their largest magnitude, and each
element has a one-byte code, the index into a table that is denser towards zero (Dettmers et al. 2022, sections 2 and 3;
the table is that of bitsandbytes). Small tensors, such as norms and biases, keep float32 states.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # elements that share a scale
SMALL = 4096  # elements; smaller tensors keep float32 states
_AT_ONCE = 1 << 23  # elements converted to float32 at a time, a multiple of BLOCK
_DECADES = 7
STATES = {"exp_avg": True, "exp_avg_sq": False}  # by name, whether it is signed


class AdamW8bitSR(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) that computes in float32 and stores its states in 8 bits.

    Weights in bfloat16 are rounded to nearest, unless `optimizing.rounding` steps them in float32. Raise ValueError for
    arguments out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError("lr, eps and weight_decay must be 0 or more, both betas 0 or more and below 1")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _step(parameter, self.state[parameter], group)


def _step(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state |= {"step": 0} | {key: value for name in STATES for key, value in _zero_state(name, parameter).items()}
    state["step"] += 1
    weight, gradient = parameter.detach().view(-1), parameter.grad.reshape(-1)  # type: ignore[union-attr]
    for start in range(0, len(weight), _AT_ONCE):
        piece = slice(start, start + _AT_ONCE)
        first, second = (_read(state, name, piece) for name in STATES)
        stepped = _adamw(weight[piece].float(), gradient[piece].float(), first, second, state["step"], group)
        weight[piece] = stepped.to(weight.dtype)
        for name, value in zip(STATES, (first, second), strict=True):
            _write(state, name, piece, value)


def _adamw(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, group: dict[str, Any]) -> Tensor:
    """Return the updated weight, and update `first` and `second` in place. All are float32, (n,)."""
    (beta1, beta2), rate = group["betas"], float(group["lr"])
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    width = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    return weight.mul_(1 - rate * group["weight_decay"]).addcdiv_(first, width, value=-rate / (1 - beta1**step))


def _zero_state(name: str, parameter: Tensor) -> dict[str, Tensor]:
    """Return a state of zeros: codes and scales, or float32 for a small tensor."""
    if parameter.numel() < SMALL:
        return {name: torch.zeros_like(parameter, dtype=torch.float32)}
    blocks = -(-parameter.numel() // BLOCK)
    scales = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
    return {name: torch.zeros_like(parameter, dtype=torch.uint8), f"{name}_scale": scales}


def _read(state: dict[str, Any], name: str, piece: slice) -> Tensor:
    kept = state[name].view(-1)[piece]
    return decode(kept, _scales(state, name, piece), signed=STATES[name]) if kept.dtype == torch.uint8 else kept


def _write(state: dict[str, Any], name: str, piece: slice, value: Tensor) -> None:
    kept = state[name].view(-1)[piece]
    if kept.dtype == torch.uint8:
        codes, scales = encode(value, signed=STATES[name])
        kept.copy_(codes)
        _scales(state, name, piece).copy_(scales)


def _scales(state: dict[str, Any], name: str, piece: slice) -> Tensor:
    scales: Tensor = state[f"{name}_scale"]
    return scales[piece.start // BLOCK : -(-piece.stop // BLOCK)]


def encode(x: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantise x, float32 (n,), to codes, uint8 (n,), and scales, float32 (ceil(n / 256),)."""
    rows = F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    scales = rows.abs().amax(1)
    table = _table(x.device, signed=signed)
    within = rows / torch.where(scales > 0, scales, 1.0).unsqueeze(1)
    codes = torch.bucketize(within, (table[1:] + table[:-1]) / 2, out_int32=True)
    return codes.view(-1)[: len(x)].to(torch.uint8), scales


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Dequantise codes and scales to float32 (n,)."""
    within = _table(codes.device, signed=signed).index_select(0, codes.int())
    return F.pad(within, (0, -len(codes) % BLOCK)).view(-1, BLOCK).mul_(scales.unsqueeze(1)).view(-1)[: len(codes)]


@cache
def _table(device: torch.device, *, signed: bool) -> Tensor:
    return code_table(signed=signed).to(device)


def code_table(*, signed: bool) -> Tensor:
    """Return the 256 code values in ascending order, from -1 or 0 to 1.

    There are seven decades, each divided into equal steps whose midpoints are the values, with twice as many steps in
    each decade as in the one below. The remaining two values are 0 and 1.
    """
    numbers = [0.0, 1.0]
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1, (1 << decade) * (1 if signed else 2) + 1, dtype=torch.float64)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade + 1 - _DECADES)).tolist()
        numbers += middles + ([-middle for middle in middles] if signed else [])
    return torch.tensor(sorted(numbers), dtype=torch.float32)
