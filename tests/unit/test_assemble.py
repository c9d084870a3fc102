"""What `equip` does to the blocks: each setting reaches them, seen in how often and where the feed-forward runs."""

from dataclasses import replace

import pytest
import torch

from tests.unit.placement.blocks import CONFIG
from wan_train.assemble import ModelSettings, equip
from wan_train.models.dit.dit import Dit
from wan_train.models.settings import DitSettings
from wan_train.placement.lanes import HostLane
from wan_train.placement.settings import RecomputeSettings, StreamSettings

TINY = replace(CONFIG, in_dim=4, out_dim=4, text_dim=8, freq_dim=8)
CPU = torch.device("cpu")


CASES = {
    "plain": (RecomputeSettings(recompute="none"), 0, [24] * 3),
    "recomputed": (RecomputeSettings(recompute="full"), 0, [24] * 6),
    "streamed": (RecomputeSettings(recompute="full"), 2, [24] * 6),
    "chunked": (RecomputeSettings(recompute="none", ffn_chunks=4), 0, [6] * 24),  # each part once more in its backward
}


@pytest.mark.parametrize("case", CASES)
def test_each_setting_reaches_the_blocks(case: str) -> None:
    """Seen in how many tokens the first product of a feed-forward takes at a time in a step, of 24."""
    activations, swapped, wanted = CASES[case]
    torch.manual_seed(0)
    model, counts = Dit(TINY).requires_grad_(False), list[int]()
    for block in model.blocks:
        block.ffn[0].register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[1]))  # type: ignore[operator]
    dit, streaming = DitSettings(task="t2v-1.3B", dit=""), StreamSettings(blocks_to_swap=swapped)
    stream = equip(model, ModelSettings(dit, stream=streaming, activations=activations), HostLane(CPU))
    latents = torch.randn(1, 4, 2, 6, 8, requires_grad=True)
    model(latents, torch.tensor([500.0]), torch.randn(1, 5, 8)).sum().backward()
    assert counts == wanted and (stream.host_bytes > 0) == bool(swapped)
