"""When rope tables are made, and that one that is kept serves whoever comes next."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.unit.models.dit.test_dit import inputs, state
from wan_train.errors import InputError
from wan_train.models.dit import rope
from wan_train.models.dit.rope import MAX_TABLES, Rate, Riflex, axis_widths, rope_table
from wan_train.models.loading import load_dit
from wan_train.placement.ledger import Ledger

CPU = torch.device("cpu")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """The devices of the tables that are made, of none to begin with."""
    devices: list[torch.device] = []
    make = rope._make_table

    def noting(places: tuple[tuple[float, ...], ...], width: int, device: torch.device, rate: Rate | None) -> Tensor:
        devices.append(device)
        return make(places, width, device, rate)

    monkeypatch.setattr(rope, "_make_table", noting)
    rope._tables.clear()
    yield devices
    rope._tables.clear()


def by_token(
    grid: tuple[int, int, int], width: int, frames: list[float], lowered: tuple[int, float] | None = None
) -> Tensor:
    """The table in its definition: every token's angles in float64; `lowered` is an index of a temporal frequency, from
    1, and its period in latent frames."""
    table = torch.empty(2, grid[0] * grid[1] * grid[2], 1, width)
    tokens = torch.cartesian_prod(torch.tensor(frames).double(), *(torch.arange(n).double() for n in grid[1:]))
    start = 0
    for axis, part in enumerate(axis_widths(width)):
        rates = rope.THETA ** -(torch.arange(0, part, 2, dtype=torch.float64) / part)
        if lowered and axis == 0:
            rates[lowered[0] - 1] = 2 * torch.pi / lowered[1]
        angles = tokens[:, axis, None] * rates
        for parity, sign in ((0, -1), (1, 1)):
            table[0, :, 0, start + parity : start + part : 2] = angles.cos().float()
            table[1, :, 0, start + parity : start + part : 2] = sign * angles.sin().float()
        start += part
    return table


@pytest.mark.parametrize("frames", [None, [3.0, 1000.0, 0.0]])
def test_a_table_is_that_of_each_token_to_the_bit(frames: list[float] | None) -> None:
    given = None if frames is None else torch.tensor(frames)
    for width in (12, 128):
        expected = by_token((3, 5, 7), width, frames or [0.0, 1.0, 2.0])
        assert torch.equal(rope_table((3, 5, 7), width, device=CPU, frames=given), expected)


@pytest.mark.parametrize(
    ("frames", "index", "period"),
    [(46, 6, 46 / 0.9), (81, 6, 90.0), (81, 4, 90.0), (22, 4, 22 / 0.9), (45, 6, None), (21, 4, None), (21, 1, None)],
)
def test_riflex_stretches_a_period_over_videos_that_are_longer_than_trained_and_than_it(
    frames: int, index: int, period: float | None
) -> None:
    grid, positions = (frames, 1, 2), [float(position) for position in range(frames)]
    plain = rope_table(grid, 128, device=CPU)
    table = rope_table(grid, 128, device=CPU, riflex=Riflex(index, 21))
    expected = by_token(grid, 128, positions, None if period is None else (index, period))
    assert torch.equal(table, plain) == (period is None)
    assert (table.double() - expected.double()).abs().max() <= 1e-7  # float32's last bit
    assert torch.equal(rope_table(grid, 128, device=CPU), plain)  # whatever tables are kept
    changed = (table != plain).any(dim=1).any(dim=0).nonzero()[:, -1].tolist()
    assert changed == ([] if period is None else [2 * index - 2, 2 * index - 1])


def test_riflex_reaches_the_model_and_refuses_a_frequency_that_it_has_not() -> None:
    model = load_dit(state(), config={"num_heads": 2})
    latents, *rest = inputs()
    long = latents.repeat(1, 1, 9, 1, 1)
    with torch.no_grad():
        plain = model(long, *rest)
        assert not torch.equal(model(long, *rest, riflex=Riflex(1, 8)), plain)
        assert torch.equal(model(long, *rest, riflex=Riflex(1, long.shape[2])), plain)
        with pytest.raises(InputError, match="22: the model has only 4 temporal frequencies"):
            model(long, *rest, riflex=Riflex(22, 8))


def test_a_second_forward_pass_makes_no_table(made: list[torch.device]) -> None:
    model = load_dit(state(), config={"num_heads": 2})
    with torch.no_grad():
        results = [model(*inputs()) for _ in range(3)]
        assert made == [CPU]
        assert all(torch.equal(each, results[0]) for each in results)
        model(*inputs(), frame_positions=torch.tensor([0.0, 1.0, 2.0]))  # where they are anyway
        assert len(made) == 1
        moved = model(*inputs(), frame_positions=torch.tensor([0, 5, 9]))
        assert len(made) == 2
        assert not torch.equal(moved, results[0])


def test_another_grid_width_or_device_has_its_own_table(made: list[torch.device]) -> None:
    first = rope_table((2, 3, 4), 12, device=CPU)
    for count, (grid, width) in enumerate([((2, 4, 3), 12), ((2, 3, 4), 24)], start=2):
        table = rope_table(grid, width, device=CPU)
        assert len(made) == count
        assert table.shape != first.shape or not torch.equal(table, first)
    assert rope_table((2, 3, 4), 12, device=torch.device("meta")).is_meta
    assert torch.equal(rope_table((2, 3, 4), 12, device=CPU), first)


def test_few_tables_are_kept(made: list[torch.device]) -> None:
    for rows in range(1, 3 * MAX_TABLES):
        rope_table((1, rows, 1), 12, device=CPU)
    assert len(rope._tables) == MAX_TABLES
    count = len(made)
    for rows in range(3 * MAX_TABLES - MAX_TABLES, 3 * MAX_TABLES):
        rope_table((1, rows, 1), 12, device=CPU)
    assert len(made) == count


def test_what_a_preview_in_inference_mode_made_trains(made: list[torch.device]) -> None:
    model = load_dit(state(), config={"num_heads": 2})
    with torch.inference_mode():
        model(*inputs())
    model.requires_grad_(True)
    model(*inputs()).sum().backward()
    assert len(made) == 1
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_table_that_is_kept_is_still_counted(made: list[torch.device]) -> None:
    """Where the bytes of a pass are planned, the table is among them, whoever was there before."""
    rope_table((2, 3, 4), 12, device=CPU)
    with Ledger() as ledger:
        table = rope_table((2, 3, 4), 12, device=CPU)
        assert ledger.alive["work"] >= table.nbytes


def test_a_compilers_notes_stay_with_their_caller() -> None:
    table = rope_table((2, 3, 4), 12, device=CPU)
    torch._dynamo.maybe_mark_dynamic(table, 1)
    again = rope_table((2, 3, 4), 12, device=CPU)
    assert again.data_ptr() == table.data_ptr()
    assert not hasattr(again, "_dynamo_weak_dynamic_indices")
