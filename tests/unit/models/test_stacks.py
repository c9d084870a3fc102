"""Block stacks have one list: a second stack is served by all that acts on blocks, without a change to it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.unit.placement.blocks import CONFIG
from wan_train.assemble import ModelSettings, equip, streamed_names
from wan_train.models.dit.block import Block
from wan_train.models.dit.dit import Dit
from wan_train.models.loading import set_attention
from wan_train.models.settings import DitSettings
from wan_train.models.stacks import BlockName, all_blocks, block_names, read_block_name, stacks
from wan_train.models.weights import diffusers_name, official_name
from wan_train.placement.lanes import HostLane
from wan_train.placement.settings import RecomputeSettings, StreamSettings

TINY = replace(CONFIG, in_dim=4, out_dim=4, text_dim=8, freq_dim=8)
CPU = torch.device("cpu")


class TwoStacks(Dit):
    """A second stack whose tokens are added behind the first one."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.vace_blocks = nn.ModuleList(Block(TINY) for _ in range(2))

    def run_blocks(self, state):  # type: ignore[no-untyped-def]
        hint = state.tokens
        for block in self.vace_blocks:
            hint = block(hint, state.context, state.modulation, state.rope)
        super().run_blocks(state)
        state.tokens = state.tokens + hint


def test_a_second_stack_is_streamed_recomputed_and_attends_with_the_first() -> None:
    torch.manual_seed(0)
    model = TwoStacks().requires_grad_(False)
    inputs = (torch.randn(1, 4, 2, 6, 8, requires_grad=True), torch.tensor([500.0]), torch.randn(1, 5, 8))
    plain = model(*inputs)
    dit, every = DitSettings(task="t2v-1.3B", dit=""), StreamSettings(blocks_to_swap=4)
    set_attention(model, "torch", device=CPU, split=True)
    made = ModelSettings(dit, stream=every, activations=RecomputeSettings(recompute="full"))
    stream = equip(model, made, HostLane(CPU))
    assert torch.equal(model(*inputs), plain) and stream.host_bytes > 0
    assert len({block.self_attn.attend for block in all_blocks(model)}) == 1  # type: ignore[union-attr]
    shapes = {name: tuple(parameter.shape) for name, parameter in TwoStacks().named_parameters()}
    stays = streamed_names(every, shapes)
    assert {read_block_name(name).stack for name in shapes if stays(name)} == {"blocks", "vace_blocks"}  # type: ignore[union-attr]
    assert not stays("head.head.weight")


def test_names() -> None:
    assert read_block_name("vace_blocks.12.ffn.0.weight") == BlockName("vace_blocks", 12, "ffn.0.weight")
    assert read_block_name("blocks.3.modulation") == BlockName("blocks", 3, "modulation")
    for name in ("head.head.weight", "blocks.x.ffn", "my_blocks.0.ffn", "blocks.0"):
        assert read_block_name(name) is None
    names = ["vace_blocks.0.a", "blocks.10.a", "blocks.2.b", "head.a", "blocks.2.a"]
    assert block_names(names) == ["vace_blocks.0", "blocks.2", "blocks.10"]
    assert list(stacks(Dit(TINY))) == ["blocks"] and list(stacks(TwoStacks())) == ["blocks", "vace_blocks"]


@pytest.mark.parametrize("stack", ["blocks", "vace_blocks"])
def test_each_stack_is_renamed(stack: str) -> None:
    assert official_name(f"{stack}.3.attn1.to_q.weight") == f"{stack}.3.self_attn.q.weight"
    assert diffusers_name(f"{stack}.3.self_attn.q.weight") == f"{stack}.3.attn1.to_q.weight"
