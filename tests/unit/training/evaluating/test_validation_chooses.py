"""What the validation loss is for, on a task whose true loss is known (benchmarks/validation.py)."""

import pytest

from benchmarks.validation import compare_variances, find_best


def test_paired_differences_are_far_surer_than_those_of_random_draws() -> None:
    of_first, of_next, of_last = compare_variances(num_keys=40)
    assert of_next["ratio"] < 0.01
    assert of_last["ratio"] < 0.05
    assert of_first["ratio"] < 0.5


@pytest.mark.slow
def test_the_keyed_estimate_has_a_fifth_of_the_variance() -> None:
    """A single loss, and the difference between trained checkpoints, which is what is acted on.

    The first checkpoint predicts no velocity at all and has almost never samples in common with a trained one, so that
    pairing can gain the least there.
    """
    of_first, *of_trained = compare_variances()
    assert of_first["ratio"] < 0.35, of_first
    for pair in of_trained:
        assert pair["ratio"] < 0.02, pair
        assert pair["single_ratio"] <= 0.2, pair


@pytest.mark.slow
def test_the_best_checkpoint_is_found_within_one_evaluation() -> None:
    found = find_best(40)
    assert found["keyed"]["within_one"] >= 0.95
    # Neither luck nor a constant place would do.
    assert found["random"]["within_one"] < 0.7
    assert found["constant"]["within_one"] < 0.7
