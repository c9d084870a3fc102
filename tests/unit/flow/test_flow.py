import pytest
import torch
from torch import Tensor

from wan_train.errors import InputError
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


def test_lcm_goes_to_the_data_and_adds_noise_for_the_next_level() -> None:
    solver = make_solver("lcm", steps=2, shift=1.0, generator=torch.Generator().manual_seed(5))
    assert solver.sigmas.tolist() == [1.0, 0.5, 0.0] and solver.timesteps.tolist() == [1000.0, 500.0]
    x = torch.full((1, 2, 3), 4.0)
    middle = solver.step(torch.full_like(x, 3.0), solver.timesteps[0], x)
    noise = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(middle, 0.5 * torch.ones_like(x) + 0.5 * noise)
    end = solver.step(torch.ones_like(x), solver.timesteps[1], middle)
    torch.testing.assert_close(end, middle - 0.5)


def test_lcm_draws_the_same_noise_for_a_seed_and_other_noise_for_another() -> None:
    def run(seed: int) -> Tensor:
        generator, x = torch.Generator().manual_seed(seed), torch.ones(1, 4)
        solver = make_solver("lcm", steps=3, shift=2.0, generator=generator)
        for timestep in solver.timesteps:
            x = solver.step(0.1 * x, timestep, x)
        return x

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


@pytest.mark.parametrize("name", SOLVERS)
def test_explicit_timesteps_are_shifted_levels(name: str) -> None:
    """1000,750,500,250 at shift 5, as distilled models list their steps: 1, 15/16, 5/6, 5/8."""
    solver = make_solver(name, shift=5.0, timesteps=(1000, 750, 500, 250))
    expected = torch.tensor([1, 15 / 16, 5 / 6, 5 / 8, 0])
    torch.testing.assert_close(solver.sigmas, expected, atol=3e-4, rtol=0)
    assert len(solver.timesteps) == 4
    again = make_solver(name, shift=5.0, steps=4)
    torch.testing.assert_close(solver.sigmas, again.sigmas, atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_run_of_less_strength_starts_lower_with_as_many_steps(name: str) -> None:
    solver = make_solver(name, steps=4, shift=3.0, strength=0.5)
    assert len(solver.timesteps) == 4
    assert solver.sigmas[0] == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=1e-3)


@pytest.mark.parametrize("timesteps", [(250, 500), (1001, 5), (500, 500), (0,), (float("nan"),)])
def test_timesteps_that_do_not_fall_are_refused(timesteps: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="must decrease"):
        make_solver("lcm", timesteps=timesteps)


def test_a_strength_out_of_range_is_refused() -> None:
    for strength in (0.0, 1.5):
        with pytest.raises(InputError, match="at most 1"):
            make_solver("euler", steps=2, strength=strength)
