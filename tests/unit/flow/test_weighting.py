import math

import pytest
import torch

from wan_train.flow.weighting import WEIGHTINGS, importance
from wan_train.training.settings import WEIGHTING_SCHEMES


def test_sigma_sqrt_is_the_inverse_square_down_to_a_thousandth() -> None:
    weights = importance("sigma_sqrt", torch.tensor([1.0, 0.5, 0.01, 0.001, 0.0]))
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([1.0, 4.0, 1e4, 1e6, 1e6]))


def test_cosmap_makes_up_for_a_cosine_path() -> None:
    weights = importance("cosmap", torch.tensor([0.0, 0.5, 1.0]))
    assert weights is not None
    assert weights.tolist() == pytest.approx([2 / math.pi, 4 / math.pi, 2 / math.pi])
    # It is the density of a level in tangents, so that its mean over uniform levels is 1.
    even = importance("cosmap", (torch.arange(1000).double() + 0.5) / 1000)
    assert even is not None
    assert float(even.mean()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("scheme", sorted(set(WEIGHTING_SCHEMES) - set(WEIGHTINGS)))
def test_the_others_weigh_nothing(scheme: str) -> None:
    assert importance(scheme, torch.rand(3)) is None
