import copy

import pytest
import torch
from torch import Tensor, nn

from wan_train.precision import _BlockLinear, upcast_on_use


class Foreign(nn.Module):
    """A part of each kind that foreign models have."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.wide = nn.Linear(8, 37)
        self.narrow = nn.Linear(37, 8, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
        return self.narrow(self.wide(self.norm(x)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_foreign_module_computes_as_its_upcast_twin(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_BlockLinear, "block_size", 64)  # several blocks, the last one smaller
    torch.manual_seed(0)
    foreign = Foreign().to(dtype)
    names = set(foreign.state_dict())
    twin = copy.deepcopy(foreign).float()
    upcast_on_use(foreign, torch.float32)
    ids = torch.randint(50, (2, 6))
    assert torch.allclose(foreign(ids), twin(ids), atol=1e-6)
    assert foreign(ids).dtype is torch.float32
    assert {p.dtype for p in foreign.parameters() if p.ndim > 1} == {dtype}
    assert {p.dtype for p in foreign.parameters() if p.ndim == 1} == {torch.float32}
    assert {"table.weight", "wide.weight", "narrow.weight"} <= names & set(foreign.state_dict())


def test_a_module_in_the_wanted_dtype_is_left_alone() -> None:
    foreign = Foreign()
    upcast_on_use(foreign, torch.float32)
    assert type(foreign.wide) is nn.Linear and type(foreign.table) is nn.Embedding
