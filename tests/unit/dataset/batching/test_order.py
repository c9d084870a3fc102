from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.batching.order import SampleKey, draw_variant, share_out, take_share


def test_an_epoch_of_everything_takes_everything_once_in_an_order_of_its_own():
    orders = [take_share(range(20), "key", epoch=epoch, size=20) for epoch in range(5)]
    assert all(sorted(order) == [(position, 0) for position in range(20)] for order in orders)
    assert len(set(map(tuple, orders))) == 5
    assert take_share(range(20), "other", epoch=0, size=20) != orders[0]


@given(st.integers(1, 30), st.integers(1, 80), st.integers(1, 12))
def test_nothing_comes_again_before_everything_has_come(num_positions, size, epochs):
    row = []
    for epoch in range(epochs):
        taken = take_share(range(num_positions), "key", epoch=epoch, size=size)
        assert len(taken) == size
        seen = Counter()
        for position, turn in taken:
            assert turn == seen[position]
            seen[position] += 1
        row += [position for position, _ in taken]
    for start in range(0, len(row), num_positions):
        whole = row[start : start + num_positions]
        assert len(set(whole)) == len(whole)


@pytest.mark.parametrize(
    ("total", "weights", "parts"),
    [
        (10, [1, 1], [5, 5]),
        (100, [1, 3], [25, 75]),
        (10, [7], [10]),
        (4, [1, 1, 1, 1000], [1, 1, 1, 1]),
        (100, [0.001, 1], [1, 99]),
        (12, [0.1, 0.2, 0.3], [2, 4, 6]),
    ],
)
def test_known_shares(total, weights, parts):
    assert share_out(total, weights) == parts


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=20), st.integers(200, 2000))
def test_shares_are_within_a_sample_or_so_of_what_is_exact(weights, total):
    parts = share_out(total, weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        exact = total * weight / sum(weights)
        assert part == 1 or abs(part - exact) <= 1 + len(weights) / 2


def draw(key, *, seed=1, epoch=1, num=3, rate=0.25):
    return draw_variant(key, seed=seed, epoch=epoch, num_captions=num, dropout_rate=rate)


def test_captions_are_drawn_alike_and_dropped_as_often_as_asked():
    drawn = Counter(draw(SampleKey(f"item {n}", 0)) for n in range(8000))
    assert abs(drawn[None] - 2000) < 150
    assert all(abs(drawn[variant] - 2000) < 150 for variant in range(3))
    assert {draw(SampleKey(f"item {n}", 0), rate=1.0) for n in range(50)} == {None}
    assert {draw(SampleKey(f"item {n}", 0), num=1, rate=0.0) for n in range(50)} == {0}


def test_a_draw_depends_on_seed_epoch_item_and_repeat_and_on_nothing_else():
    def draws(seed=1, epoch=1, repeat=0):
        return [draw(SampleKey(f"item {n}", repeat), seed=seed, epoch=epoch) for n in range(40)]

    assert draws() == draws()
    others = [draws(), draws(seed=2), draws(epoch=2), draws(repeat=1)]
    assert len(set(map(tuple, others))) == 4
