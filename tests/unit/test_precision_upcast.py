import copy

import pytest
import torch
from torch import Tensor, nn

from wan_train.precision import _BlockLinear, _looked_up, take_rows, upcast_on_use, widened


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


@pytest.mark.parametrize("groups", [None, (1, 1), (37, 1), (37, 4)], ids=str)
def test_a_linear_of_eight_bits_multiplies_by_its_codes_and_scales(
    groups: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_BlockLinear, "block_size", 64)
    torch.manual_seed(0)
    linear = nn.Linear(16, 37)
    codes = linear.weight.detach().to(torch.float8_e4m3fn)
    scale = None if groups is None else torch.rand(*groups, 1) + 0.5
    linear.weight = nn.Parameter(codes, requires_grad=False)
    if scale is not None:
        linear.register_buffer("scale_weight", scale)
    upcast_on_use(linear, torch.float32)
    x = torch.randn(3, 16)
    expected = x @ widened(codes, scale, torch.float32).t() + linear.bias
    torch.testing.assert_close(linear(x), expected)
    assert linear.weight.dtype is torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_code_is_looked_up_as_it_is_cast(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(dtype)
    assert torch.equal(_looked_up(codes).nan_to_num(nan=1e6), codes.float().nan_to_num(nan=1e6))


class FarIds:
    """Stands for ids on an accelerator: they can be fetched, and rows can be sent there."""

    device = torch.device("meta")

    def to(self, device: torch.device) -> Tensor:
        return torch.zeros(2, 3, dtype=torch.long, device=device)


def test_rows_come_to_where_the_ids_are_and_the_table_stays() -> None:
    table = nn.Embedding(50, 8, dtype=torch.float16)
    take_rows(table, torch.bfloat16)
    rows = table(FarIds())
    assert (rows.device.type, rows.dtype, rows.shape) == ("meta", torch.bfloat16, (2, 3, 8))
    assert table.weight.device.type == "cpu" and table.weight.dtype is torch.float16
