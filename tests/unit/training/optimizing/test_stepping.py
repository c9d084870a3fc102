"""What is trained is stepped in parts, those that stream on the device: of each stack of blocks that a model has."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wan_train.models.stacks import all_blocks
from wan_train.placement.lanes import HostLane
from wan_train.placement.settings import StreamSettings
from wan_train.placement.stream import Stream, apply_stream
from wan_train.training.optimizing.fused import FusedBackward
from wan_train.training.optimizing.optimizers import make_optimizer
from wan_train.training.optimizing.stepping import parts_of
from wan_train.training.settings import OptimizerSettings

BLOCKS, SECOND = 4, 2
EXPERTS = ("high_noise", "low_noise")


class TwoStacks(nn.Module):
    """Every second block has one of the second stack that adds to what it gives, as VACE's blocks do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(BLOCKS))
        self.vace_blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(SECOND))
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hints, hint = [], x
        for block in self.vace_blocks:
            hint = checkpoint(block, hint, use_reentrant=False)
            hints.append(hint)
        for index, block in enumerate(self.blocks):
            x = torch.tanh(checkpoint(block, x, use_reentrant=False)) + (hints[index // 2] if index % 2 else 0)
        return self.head(x).square().mean()


def test_parts_are_the_blocks_of_each_stack() -> None:
    names = ["blocks.1.a", "vace_blocks.1.a", "vace_blocks.1.b", "vace_patch_embedding.a", "low_noise.vace_blocks.0.a"]
    parts = parts_of({name: nn.Parameter(torch.zeros(1)) for name in names}, {})
    assert {part.name: len(part.parameters) for part in parts} == {
        "blocks.1": 1,
        "vace_blocks.1": 2,
        "vace_patch_embedding": 1,
        "low_noise.vace_blocks.0": 1,
    }


def test_an_expert_is_held_by_its_own_stream() -> None:
    entered: list[tuple[str, int]] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def held(self, weights: list[nn.Parameter]) -> Any:
            entered.append((self.name, len(weights)))

    weights = {f"{expert}.blocks.0.{leaf}": nn.Parameter(torch.zeros(1)) for expert in EXPERTS for leaf in "ab"}
    streams: Any = {expert: Named(expert) for expert in EXPERTS}
    for part in parts_of(weights, streams):
        part.held()
    assert entered == [("high_noise", 2), ("low_noise", 2)]


@pytest.mark.parametrize("fused", [False, True])
def test_two_stacks_that_stream_learn_what_plain_ones_do(fused: bool) -> None:
    plain, streamed = TwoStacks(), TwoStacks()
    stream = apply_stream(
        all_blocks(streamed), StreamSettings(blocks_to_swap=BLOCKS + SECOND), HostLane(torch.device("cpu"))
    )
    for model, streams in ((plain, {}), (streamed, {None: stream})):
        train(model, streams, fused=fused)
    stream.settle()
    for (name, found), wanted in zip(streamed.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, wanted), name
    assert not torch.equal(plain.vace_blocks[0].weight, TwoStacks().vace_blocks[0].weight)


def train(model: TwoStacks, streams: dict[str | None, Stream], *, fused: bool) -> None:
    settings = OptimizerSettings(optimizer_type="AdamW", learning_rate=1e-2)
    optimizer = make_optimizer([{"params": list(model.parameters()), "lr": 1e-2}], settings, step_contexts=())
    optimizer.parts = parts_of(dict(model.named_parameters()), streams)
    stepping = FusedBackward(optimizer, optimizer.parts if fused else (), limit=math.inf)
    for step in range(3):
        model(torch.randn(5, 8, generator=torch.Generator().manual_seed(step))).backward()
        stepping.finish()
        optimizer.step()
        optimizer.zero_grad()
