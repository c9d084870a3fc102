import pytest

from wan_train.flow.boundaries import UNITS, describe_boundary, from_index_fraction, index_fraction
from wan_train.flow.timesteps import shift


@pytest.mark.parametrize(
    ("factor", "of_t2v", "of_i2v"), [(5, 0.4167, 0.3571), (3, 0.3, 0.25), (12, 0.632, 0.571), (1, 0.125, 0.1)]
)
def test_the_known_table_of_index_fractions(factor: float, of_t2v: float, of_i2v: float) -> None:
    assert index_fraction(0.875, factor) == pytest.approx(of_t2v, abs=5e-4)
    assert index_fraction(0.9, factor) == pytest.approx(of_i2v, abs=5e-4)
    for boundary in (0.3, 0.875, 0.9):
        fraction = index_fraction(boundary, factor)
        assert from_index_fraction(fraction, factor) == pytest.approx(boundary)
        assert shift(1 - fraction, factor) == pytest.approx(boundary)  # the level at that place of the shifted list


def test_every_tool_has_a_line() -> None:
    text = describe_boundary(0.875)
    assert len(text.splitlines()) == len(UNITS)
    assert "0.4167" in text and "--timestep_boundary 875" in text and "min_t = 0.875" in text
