import json
import math
from io import BytesIO

import numpy as np
import pytest
import torch
from scipy import stats

from wan_train.training.evaluating.statistics import History, Losses, draw_files, find_interval, student

CLIPS, STRATA = 12, 4
FILES = [f"clip{number}" for number in range(CLIPS)]


def losses(shift: float = 0.0, *, noise: float = 0.0, key: int = 0) -> Losses:
    """The same losses each time, each moved by `shift` and by some noise of its own."""
    same = np.random.default_rng(99).random((CLIPS, STRATA))
    return (same + shift + noise * np.random.default_rng(key).standard_normal((CLIPS, STRATA))).astype(np.float32)


def test_the_mean_is_over_clips_and_each_stratum_has_its_own() -> None:
    values = losses()
    found = History(FILES, seed=0).add(0, values)
    assert found.mean == pytest.approx(values.mean(dtype=np.float64), rel=1e-12)
    np.testing.assert_allclose(found.strata, values.mean(0), rtol=1e-6)
    assert (found.num_clips, found.num_files, found.verdict, found.is_best) == (CLIPS, CLIPS, "first", True)
    assert found.to_first is None and found.to_best is None


def test_a_change_is_paired_and_judged_by_its_interval() -> None:
    history = History(FILES, seed=0)
    history.add(0, losses())
    better = history.add(10, losses(-0.01, noise=0.005, key=1))  # a hundredth of what clips differ by
    assert better.verdict == "improved" and better.is_best
    unclear = history.add(20, losses(-0.01, noise=0.005, key=2))
    assert unclear.verdict == "unclear"
    worse = history.add(30, losses(0.01, noise=0.005, key=3))
    assert worse.verdict == "worse" and not worse.is_best
    assert worse.to_first and worse.to_best
    assert worse.to_first.step == 0 and worse.to_best.step == history.best_step in (10, 20)
    assert worse.to_first.low < 0.01 < worse.to_first.high
    assert worse.to_first.mean == pytest.approx(worse.mean - losses().mean(dtype=np.float64), abs=1e-7)
    assert worse.to_best.low < worse.to_best.mean < worse.to_best.high


def test_the_best_is_the_lowest_mean_and_the_log_says_what_changed() -> None:
    history = History(FILES, seed=0)
    found = [history.add(step, losses(shift)) for step, shift in ((0, 0.0), (5, -0.2), (10, -0.1), (15, -0.3))]
    assert [each.is_best for each in found] == [True, True, False, True]
    assert history.best_step == 15
    assert "at step 10: worse, 0.10000 above the best so far, of step 5" in found[2].describe()
    assert "at step 15: improved, 0.10000 below the best so far, of step 5 (95% interval -0.1" in found[3].describe()
    assert "; 0.30000 below the first, of step 0 (95% interval -0.3" in found[3].describe()
    assert "the first" not in found[1].describe()  # it is the best so far, and named as that


def test_many_small_improvements_are_one_sure_one() -> None:
    """Each step down is within its interval, three of them are not: patience is not lost on the way."""
    history = History(FILES, seed=0)
    since = []
    for number in range(16):
        found = history.add(number, losses(-0.002 * number, noise=0.014, key=number))
        since.append(history.since)
    assert found.to_best and max(since) >= 2, since
    assert since.count(0) >= 2, since
    flat = History(FILES, seed=0)
    for number in range(6):
        flat.add(number, losses(noise=0.014, key=number))
    assert flat.since >= 4


def test_rows_are_strict_json_even_where_a_loss_is_no_number() -> None:
    history = History(FILES, seed=0)
    history.add(0, losses())
    broken = losses()
    broken[3, 1] = math.nan
    found = history.add(5, broken)
    row = json.loads(json.dumps(found.row(), allow_nan=False))
    assert row["step"] == 5
    assert row["validation"]["loss"] is None
    assert row["validation"]["verdict"] == found.verdict == "not finite"
    assert [value is None for value in row["validation"]["strata"]] == [False, True, False, False]
    assert not found.is_best and history.since == 1 and history.best_step == 0
    assert history.add(10, losses(-0.1)).verdict == "improved"


def test_a_broken_first_evaluation_does_not_stand_in_the_way() -> None:
    history = History(FILES, seed=0)
    history.add(0, np.full((CLIPS, STRATA), np.nan, np.float32))
    found = history.add(5, losses())
    assert found.is_best and found.verdict == "first" and history.since == 0
    json.dumps(found.row(), allow_nan=False)


def test_a_history_goes_on_where_its_state_was_saved() -> None:
    shifts = [0.0, -0.02, -0.01, -0.03, -0.02, 0.01]
    whole, first, second = (History(FILES, seed=3) for _ in range(3))
    expected = [whole.add(n, losses(shift, noise=0.02, key=n)) for n, shift in enumerate(shifts)]
    for number in range(3):
        first.add(number, losses(shifts[number], noise=0.02, key=number))
    kept = BytesIO()
    torch.save(first.state_dict(), kept)
    kept.seek(0)
    second.load_state_dict(torch.load(kept, weights_only=True))
    found = [second.add(n, losses(shifts[n], noise=0.02, key=n)) for n in range(3, 6)]
    assert found == expected[3:]
    assert (second.since, second.means) == (whole.since, whole.means)


@pytest.mark.parametrize(("num_files", "clips_each"), [(3, 1), (6, 1), (6, 4), (30, 1)])
def test_the_interval_holds_the_truth_as_often_as_it_says(num_files: int, clips_each: int) -> None:
    """Also for the few files that users hold out, and for files whose clips are alike."""
    generator, held, trials = np.random.default_rng(num_files), 0, 600
    draws = draw_files(num_files, seed=1)
    sizes = np.full(num_files, clips_each)
    for _ in range(trials):
        of_file = generator.standard_normal(num_files)
        sums = clips_each * of_file + math.sqrt(clips_each) * 0.3 * generator.standard_normal(num_files)
        low, high = find_interval(sums, sizes, draws)
        held += low < 0 < high
    # Draws of three files have but ten means, which makes the interval coarse.
    assert 0.93 - 0.02 * (num_files == 3) <= held / trials <= 0.985


def test_clips_of_one_file_are_no_evidence_on_their_own() -> None:
    change = np.random.default_rng(5).standard_normal((4, 1)).repeat(3, 0) * 0.02 - 0.015
    after = (losses() + change).astype(np.float32)
    verdicts = []
    for files in (FILES, [f"file{number // 3}" for number in range(CLIPS)]):
        history = History(files, seed=0)
        history.add(0, losses())
        found = history.add(1, after)
        assert found.to_best
        verdicts.append(found.to_best.high - found.to_best.low)
    assert verdicts[1] > 1.7 * verdicts[0]


def test_one_file_gives_no_verdict() -> None:
    history = History(["only"] * CLIPS, seed=0)
    history.add(0, losses())
    found = history.add(1, losses(-0.5))
    assert found.verdict == "unclear" and found.is_best
    assert found.row()["validation"]["to_best"]["low"] is None
    assert "no interval for one file" in found.describe()


@pytest.mark.parametrize("freedom", [1, 2, 5, 10, 11, 20, 100])
def test_students_quantile(freedom: int) -> None:
    assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)
