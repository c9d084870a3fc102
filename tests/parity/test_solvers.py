"""Our solvers on the official grids against the official samplers' stored trajectories."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.parity.golden import TOLERANCE, load_case, normal, relative_error
from wan_train.flow.solvers import make_solver


@pytest.mark.parametrize("name", ["solver_unipc_10_5", "solver_unipc_4_3", "solver_dpmpp_10_5", "solver_dpmpp_4_3"])
def test_grid_and_trajectory(name: str) -> None:
    case = load_case(name)
    solver = make_solver(case.spec["solver"], steps=case.spec["steps"], shift=case.spec["shift"])
    assert torch.equal(solver.timesteps, case.outputs["timesteps"])
    torch.testing.assert_close(solver.sigmas, case.outputs["sigmas"], atol=1e-6, rtol=0)
    x, a = case.normal("x", (1, 4, 3, 6, 6)), case.normal("a", (1, 4, 3, 6, 6))
    for timestep, expected in zip(solver.timesteps, case.outputs["trajectory"], strict=True):
        x = solver.step(0.5 * torch.sin(x) + a * (timestep / 1000), timestep, x)
        assert relative_error(x, expected) < TOLERANCE


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_euler_is_that_of_diffusers(strength: float) -> None:
    ours = make_solver("euler", steps=7, shift=5.0, strength=strength)
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(7)
    theirs.sigmas, theirs.timesteps = ours.sigmas, ours.timesteps
    theirs.set_begin_index(0)
    torch.testing.assert_close(ours.timesteps, 1000 * ours.sigmas[:-1])
    x = y = normal("x", (1, 4, 3, 6, 6))
    for timestep in ours.timesteps:
        x = ours.step(torch.sin(x), timestep, x)
        y = theirs.step(torch.sin(y), timestep, y, return_dict=False)[0]
        assert torch.equal(x, y)
