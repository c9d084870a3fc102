import pytest
import torch

from wan_train.cli import InputError
from wan_train.flow.path import interpolate, velocity
from wan_train.flow.solvers import SOLVERS, make_solver
from wan_train.flow.timesteps import shift
from wan_train.sampling.settings import SOLVER_NAMES


def test_the_path_runs_from_data_to_noise_at_its_velocity() -> None:
    data, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(interpolate(data, noise, torch.tensor([0.0, 0.0])), data)
    assert torch.equal(interpolate(data, noise, torch.tensor([1.0, 1.0])), noise)
    early, late = torch.tensor([0.25, 0.5]), torch.tensor([0.5, 0.75])
    slope = (interpolate(data, noise, late) - interpolate(data, noise, early)) / 0.25
    torch.testing.assert_close(slope, velocity(data, noise))


def test_shift_keeps_the_ends_and_its_published_values() -> None:
    assert shift(torch.tensor([0.0, 1.0]), 5.0).tolist() == [0.0, 1.0]
    # The index fractions of the two-expert boundaries at shift 5: 0.4167 from the noisy end is t = 0.875.
    assert shift(torch.tensor(1 - 0.416667), 5.0).item() == pytest.approx(0.875, abs=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_lands_on_the_data_of_a_straight_field(name: str) -> None:
    torch.manual_seed(0)
    data, noise = torch.randn(1, 4), torch.randn(1, 4)
    solver = make_solver(name, steps=8, shift=3.0)
    x = interpolate(data, noise, solver.sigmas[:1])
    for index, timestep in enumerate(solver.timesteps):
        sigma = solver.sigmas[index]
        x = solver.step((x - data) / sigma, timestep, x)
    torch.testing.assert_close(x, data, atol=1e-4, rtol=1e-4)


def test_repeated_timesteps_do_not_lose_a_step() -> None:
    solver = make_solver("unipc", steps=60, shift=100.0)
    assert len(solver.timesteps.unique()) < len(solver.timesteps)
    x = torch.ones(1, 2)
    for timestep in solver.timesteps:
        x = solver.step(torch.ones(1, 2), timestep, x)
    assert x.isfinite().all()


def test_unknown_solvers_and_values_out_of_range_are_refused() -> None:
    for name, steps, factor in (("eular", 4, 1.0), ("euler", 0, 1.0), ("euler", 4, 0.0)):
        with pytest.raises(InputError):
            make_solver(name, steps=steps, shift=factor)


def test_the_command_line_offers_what_the_tables_hold() -> None:
    assert set(SOLVER_NAMES) == set(SOLVERS)
