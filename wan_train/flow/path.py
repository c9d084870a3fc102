"""The straight path between data and noise (rectified flow, Liu et al. 2022, eq. 1)."""

from torch import Tensor


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t = (1-t) data + t noise. `t` (B,) is in [0, 1], 1 is pure noise; the tensors (B, ...) share a shape."""
    t = t.view(-1, *[1] * (data.ndim - 1))
    return (1 - t) * data + t * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """Return the prediction target, dx_t/dt = noise - data."""
    return noise - data
