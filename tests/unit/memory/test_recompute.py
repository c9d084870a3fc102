import pytest
import torch

from wan_train.cli import InputError
from wan_train.memory.recompute import apply_recompute
from wan_train.models.dit import Dit, DitConfig


def step(mode: str) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    torch.manual_seed(0)
    model = Dit(DitConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=3, text_dim=8))
    apply_recompute(model.blocks, mode)
    latents, text = torch.randn(1, 16, 2, 4, 4), [torch.randn(3, 8)]
    saved = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(latents, torch.tensor([500.0]), text).square().mean()
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None], saved


def test_recomputing_changes_memory_and_nothing_else() -> None:
    plain_loss, plain_grads, plain_saved = step("none")
    loss, grads, saved = step("full")
    assert torch.equal(loss, plain_loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain_grads, strict=True))
    assert saved < plain_saved / 3


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(InputError, match="none, full"):
        apply_recompute([], "some")
