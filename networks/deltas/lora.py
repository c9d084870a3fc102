"""Low-rank adaptation (Hu et al. 2021): W x becomes W x + alpha/r * up (down x), with rank r.

Shapes: down (r, in), up (out, r), x (..., in), hidden (..., r), output (..., out); for a convolution down (r, in, k,
k), up (out, r, 1, 1), x (N, in, h, w), hidden (N, r, h', w'), output (N, out, h', w').

Both products of a branch are accumulated into existing tensors: the output in the forward pass, and the input's
gradient in the backward pass. For wide layers, another tensor of that size would cost more than the products.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from wan_train.precision import Conv2d


@dataclass(frozen=True)
class LoraDelta:
    """A `Delta`: scale * up @ down, with factors as in the file; those of a convolution are flattened from dimension 1
    on."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (out, in, k, k)."""
        return self.up.shape[0], *self.down.shape[1:]

    def add_to(self, total: Tensor, multiplier: float) -> None:
        """Add multiplier * scale * up @ down to `total`, float32, in place."""
        down, up = (factor.to(total.device, torch.float32).flatten(1) for factor in (self.down, self.up))
        total.view(len(total), -1).addmm_(up, down, alpha=multiplier * self.scale)

    @classmethod
    def branch(cls, changes: "Sequence[tuple[LoraDelta, float]]") -> "LoraBranch":
        """Return one branch with the combined effect: a single pair unchanged, several as one pair with the sum of
        their ranks."""
        downs = [delta.down.to(torch.float32, copy=True) for delta, _ in changes]
        ups = [delta.up.to(torch.float32, copy=True) for delta, _ in changes]
        scales = [delta.scale * multiplier for delta, multiplier in changes]
        if len(changes) == 1:
            return LoraBranch(downs[0], ups[0], scale=scales[0])
        scaled = [up * scale for up, scale in zip(ups, scales, strict=True)]
        return LoraBranch(torch.cat(downs), torch.cat(scaled, dim=1), scale=1.0)


class Factor(nn.Module):
    """One matrix of a pair. Not an `nn.Linear`, so that code which looks for Linears does not quantise or wrap it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


@dataclass(frozen=True)
class Dropouts:
    """Dropout probabilities of a pair in training, from 0 to below 1 (the three of kohya's sd-scripts).

    `neuron` drops single rank activations per token and `rank` whole ranks per sample, both rescaled by 1/(1 - p);
    `module` drops the pair for a whole batch, without rescaling.
    """

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0


@dataclass(frozen=True)
class Window:
    """Stride and padding of a convolution, by height and width."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]


class LoraBranch(nn.Module):
    """The pair of one Linear or convolution: `before` gets its input, `after` its output. It acts while `enabled`."""

    def __init__(
        self,
        down: Tensor,
        up: Tensor,
        *,
        scale: float,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.down, self.up = Factor(down), Factor(up)
        self.scale = scale
        self.dropouts = Dropouts(dropout, rank_dropout, module_dropout)
        self.enabled = True
        self.window: Window | None = None  # of a convolution
        self.hidden: Tensor | None = None  # passed from `before` to `after`

    def follow(self, conv: Conv2d) -> None:
        """Act on a convolution: copy its stride and padding."""
        assert not isinstance(conv.padding, str)
        self.window = Window(conv.stride, conv.padding)

    def before(self, x: Tensor) -> Tensor:
        """Return the Linear's input x (..., in); stores its rank activations."""
        x = x.to(_product_dtype(x))
        # In these cases `after` computes everything: graphs keep no state on modules, convolutions do not accumulate.
        if torch.compiler.is_compiling() or self.window is not None:
            return x
        down = self.down.weight.to(x.dtype)
        if x.requires_grad and torch.is_grad_enabled():
            x, hidden = _Down.apply(x, down)  # type: ignore[no-untyped-call]
        else:
            hidden = F.linear(x, down)
        self.hidden = self._dropped(hidden)
        return x

    def after(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the Linear's output (..., out) for x, the result of `before`, with the branch added in place."""
        if self.window is not None:
            return self._convolved(x, output, self.window)
        up = self.up.weight.to(output.dtype)
        if torch.compiler.is_compiling():  # the compiler fuses the plain form itself
            hidden = self._dropped(F.linear(x, self.down.weight.to(x.dtype)))
            return torch.add(output, F.linear(hidden.to(output.dtype), up), alpha=self.scale)
        assert self.hidden is not None
        hidden, self.hidden = self.hidden.to(output.dtype), None
        added: Tensor = _Up.apply(output, hidden, up, self.scale)  # type: ignore[no-untyped-call]
        return added

    def _convolved(self, x: Tensor, output: Tensor, window: Window) -> Tensor:
        hidden = F.conv2d(x, self.down.weight.to(x.dtype), stride=window.stride, padding=window.padding)
        hidden = self._dropped(hidden.movedim(1, -1)).movedim(-1, 1).to(output.dtype)
        return torch.add(output, F.conv2d(hidden, self.up.weight.to(output.dtype)), alpha=self.scale)

    def _dropped(self, hidden: Tensor) -> Tensor:
        return drop(hidden, self.dropouts) if self.training else hidden


def drop(hidden: Tensor, dropouts: Dropouts) -> Tensor:
    """Return the rank activations (B, ..., r) with dropout; the only place that draws for it, from torch's generator.

    Dropped values are multiplied by 0, so that every parameter is part of every graph: data-parallel training waits for
    the gradients of all parameters.
    """
    if dropouts.module > 0:
        hidden = hidden * _kept(hidden, (), dropouts.module)
    if dropouts.neuron > 0:
        hidden = F.dropout(hidden, dropouts.neuron)
    if dropouts.rank > 0:
        shape = (hidden.shape[0], *(1 for _ in hidden.shape[2:]), hidden.shape[-1])
        hidden = hidden * (_kept(hidden, shape, dropouts.rank) / (1 - dropouts.rank))
    return hidden


def _kept(like: Tensor, shape: tuple[int, ...], probability: float) -> Tensor:
    """Return 1 for kept values and 0 for those dropped with this probability."""
    return (torch.rand(shape, device=like.device) >= probability).to(like.dtype)


class _Down(torch.autograd.Function):
    """(x, down) -> (x, x down^T). Only the Linear reads the returned x, so its gradient can be accumulated in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, down)
        return x.detach(), F.linear(x, down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_hidden: Tensor) -> tuple[Tensor, Tensor]:
        x, down = ctx.saved_tensors
        rows = grad_hidden.flatten(0, -2)
        return _add_product(grad_x, rows, down), rows.t() @ x.flatten(0, -2)


class _Up(torch.autograd.Function):
    """(output, hidden, up) -> output + scale * hidden up^T, in output's memory."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, hidden: Tensor, up: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(hidden, up)
        ctx.scale = scale
        # Detached, so that autograd does not treat it as a view, and copy the gradient or refuse in-place operations.
        return _add_product(output, hidden.flatten(0, -2), up.t(), scale).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        hidden, up = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_hidden = _scaled_product(rows, up, ctx.scale).view_as(hidden)
        grad_up = _scaled_product(hidden.flatten(0, -2).t(), rows, ctx.scale).t()
        return grad, grad_hidden, grad_up, None


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Return total (..., n) + scale * left (rows, r) @ right (r, n), in place if `total` is contiguous."""
    return total.flatten(0, -2).addmm_(left, right, alpha=scale).view(total.shape)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return scale * left @ right; the product scales, so this takes no operation more, and no rounding in between."""
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scale)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that the Linear computes in: autocast's if enabled, else the input's."""
    kind = x.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def initial_down(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return the initial `down` of the module `name`: independent of earlier draws, and the same in all processes."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
