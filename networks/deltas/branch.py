"""Branches beside a Linear or a convolution: child modules called by hooks of the layer.

The layer is not replaced: its parameters keep their names, and quantised or offloaded weights work as without a branch.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast, runtime_checkable

from torch import Tensor, nn

from wan_train.precision import Conv2d

Target = nn.Linear | Conv2d  # modules that a branch can act on
CHILD = "lora"  # for all kinds of branches; part of the parameter names in saved states


class Branch(Protocol):
    """An `nn.Module` that changes the computation of one Linear. It acts while `enabled`."""

    enabled: bool

    def before(self, x: Tensor) -> Tensor:
        """Return the Linear's input x (..., in), in the dtype of the Linear's products."""
        ...

    def after(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the Linear's output (..., out) with the change added, maybe in place; x is the result of `before`."""
        ...


@runtime_checkable
class ConvolutionBranch(Branch, Protocol):
    """A branch that can also act on a convolution: x is (N, in, h, w) then, and the output (N, out, h', w')."""

    def follow(self, conv: Conv2d) -> None:
        """Copy the stride and padding of the convolution."""
        ...


class Chain(nn.Module):
    """Several branches of one Linear as one branch."""

    def __init__(self, branches: Sequence[Branch]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_module(branch) for branch in branches)
        self.enabled = True

    def before(self, x: Tensor) -> Tensor:
        """Return x (..., in) after all branches."""
        for branch in self.branches:
            x = cast(Branch, branch).before(x)
        return x

    def after(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the Linear's output (..., out) for x with every branch added."""
        for branch in self.branches:
            output = cast(Branch, branch).after(x, output)
        return output


def chained(branches: Sequence[Branch]) -> Branch:
    """Return one branch for all of these; a single one is returned unchanged."""
    return branches[0] if len(branches) == 1 else Chain(branches)


def branch_targets(model: nn.Module) -> dict[str, Target]:
    """Return the modules that branches can act on, by dotted name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Target)}


def weight_shape(target: Target) -> tuple[int, ...]:
    """Return (out, in) of a Linear, (out, in, k, k) of a convolution, however the weight is stored."""
    if isinstance(target, nn.Linear):
        return target.out_features, target.in_features
    return target.out_channels, target.in_channels, *target.kernel_size


def attach_branch(target: Target, branch: Branch) -> nn.Module:
    """Attach `branch` to `target` as its child `lora`; return that child."""
    assert not hasattr(target, CHILD), "a Linear can have only one branch"
    if isinstance(target, Conv2d):
        assert isinstance(branch, ConvolutionBranch), "a branch of this kind only acts on Linears"
        branch.follow(target)
    module = _module(branch)
    target.add_module(CHILD, module)
    target.register_forward_pre_hook(_before)
    target.register_forward_hook(_after)
    return module


@contextmanager
def disabled(branches: Iterable[Branch]) -> Iterator[None]:
    """Disable these branches within this context.

    A backward pass must run inside the context if its forward pass did, and outside otherwise: recomputation checks
    again.
    """
    before = [(branch, branch.enabled) for branch in branches]
    for branch, _ in before:
        branch.enabled = False
    try:
        yield
    finally:
        for branch, was in before:
            branch.enabled = was


def _before(linear: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    branch = cast(Branch, linear.lora)
    (x,) = inputs
    return (branch.before(x),) if branch.enabled else inputs


def _after(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    branch = cast(Branch, linear.lora)
    (x,) = inputs
    return branch.after(x, output) if branch.enabled else output


def _module(branch: Branch) -> nn.Module:
    assert isinstance(branch, nn.Module), "a branch is a child module of its Linear"
    return branch
