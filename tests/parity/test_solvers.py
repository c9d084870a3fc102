"""Our solvers on the official grids against the official samplers' stored trajectories."""

import pytest
import torch

from tests.parity.golden import TOLERANCE, load_case, relative_error
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
