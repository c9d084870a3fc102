"""Block swap with the real blocks, with compiled ones, for long, and on a real device."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from networks.lora_wan import attach
from networks.settings import NetworkSettings
from tests.unit.placement.recording import (
    CPU,
    RecordingLane,
    Toy,
    Watch,
    all_equal,
    checkpointed,
    preview,
    stream_toy,
    train_step,
    untouched,
)
from wan_train.models.dit.dit import Dit, DitConfig
from wan_train.placement.lanes import make_lane
from wan_train.placement.settings import StreamSettings
from wan_train.placement.stream import apply_stream


def make_dit(**changes: Any) -> Dit:
    torch.manual_seed(0)
    geometry: dict[str, Any] = {"dim": 48, "ffn_dim": 96, "num_heads": 2, "num_layers": 5, "text_dim": 8} | changes
    return Dit(DitConfig(**geometry))


def dit_step(dit: Dit, optimizer: torch.optim.Optimizer, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 16, 2, 4, 4, generator=generator).to(dit.head.modulation.device)
    text = torch.randn(1, 512, 8, generator=generator).to(latents)
    y = dit(latents, torch.tensor([500.0], device=latents.device), text)
    y.square().mean().backward()
    grads = [p.grad.clone() for p in dit.parameters() if p.grad is not None]
    optimizer.step()
    optimizer.zero_grad()
    return [y.detach(), *grads]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_real_blocks_with_lora(late: bool, stored: torch.dtype) -> None:
    results, exports = [], []
    for count in (0, 4):
        dit = make_dit()
        adapter = attach(dit, NetworkSettings(network_dim=2), seed=1)
        for block in dit.blocks:
            for p in block.parameters():
                if not p.requires_grad:
                    p.data = p.data.to(stored)
        lane = RecordingLane(late)
        apply_stream(dit.blocks, StreamSettings(blocks_to_swap=count), lane)
        checkpointed(dit.blocks)
        optimizer = torch.optim.AdamW([p for p in dit.parameters() if p.requires_grad], lr=1e-3)
        with Watch(lane), untouched(lane.pinned):
            results.append([t for seed in range(3) for t in dit_step(dit, optimizer, seed)])
        exports.append(adapter.export())
    assert all_equal(results[1], results[0])
    assert all(torch.equal(exports[1][name], value) for name, value in exports[0].items())


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_blocks_are_not_compiled_again_for_other_slots(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    plain, toy = Toy(5, widths=[8]), Toy(5, widths=[8])
    for block in toy.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    lane = RecordingLane(late=True)
    stream_toy(toy, 4, 3, lane)
    for seed in range(5):
        if seed == 2:
            first = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for found, expected in zip(train_step(toy, seed), train_step(plain, seed), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(preview(toy, seed), preview(plain, seed), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == first > 0
    torch._dynamo.reset()


def count_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def test_two_hundred_steps_leave_no_tensor_behind() -> None:
    toy = Toy(3)
    stream_toy(toy, 3, 2, make_lane(CPU))
    for seed in range(200):
        train_step(toy, seed)
        if seed % 50 == 9:
            preview(toy, seed)
            if seed == 9:
                before = count_tensors()
    assert count_tensors() <= before


def attend_plainly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention whose gradients do not vary from run to run, (B, L, N, D)."""
    scores = torch.einsum("blnd,bsnd->bnls", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bnls,bsnd->blnd", scores.softmax(dim=-1), value)


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "ring"), [(7, 2), (4, 3), (8, 8)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_real_streams(count: int, ring: int, stored: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    results, peaks = [], []
    for streamed in (0, count):
        dit = make_dit(dim=1024, ffn_dim=4096, num_heads=8, num_layers=8)
        attach(dit, NetworkSettings(network_dim=4), seed=1)
        for block in dit.blocks:
            block.self_attn.attend = block.cross_attn.attend = attend_plainly
            for p in block.parameters():
                if p.ndim == 2 and not p.requires_grad:
                    p.data = p.data.to(stored)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        settings_ = StreamSettings(blocks_to_swap=streamed, block_swap_ring_size=ring)
        stream = apply_stream(dit.blocks, settings_, make_lane(device))
        for name, tensor in (*dit.named_parameters(), *dit.named_buffers()):
            if name not in stream.names(dit):
                tensor.data = tensor.data.to(device)
        assert stream.names(dit) == {n for n, t in dit.state_dict().items() if t.device.type == "cpu"}
        checkpointed(dit.blocks)
        optimizer = torch.optim.AdamW([p for p in dit.parameters() if p.requires_grad], lr=1e-3)
        run = []
        for seed in range(6):
            run += [t.cpu() for t in dit_step(dit, optimizer, seed)]
            with torch.no_grad():
                latents = torch.full((1, 16, 2, 4, 4), 0.1 * seed, device=device)
                text = torch.ones(1, 512, 8, device=device)
                run.append(dit(latents, torch.tensor([10.0], device=device), text).cpu())
        results.append(run)
        peaks.append(torch.cuda.max_memory_allocated() - start)
        saved = stream.host_bytes - stream.device_bytes
        del dit, stream, optimizer
        gc.collect()
    assert all_equal(results[1], results[0])
    assert peaks[1] < peaks[0] - 0.9 * saved + 2**20
