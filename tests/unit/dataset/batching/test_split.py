from dataclasses import replace
from pathlib import Path

import pytest

from dataset.batching.batches import CachedDataset
from dataset.batching.split import choose_names, find_shared, name_files, split_off
from dataset.config import DatasetConfig
from dataset.items import Clip, Item
from dataset.sources import ClipPlan
from wan_train.errors import InputError


def plan(number: int, names: list[str], *, repeats: int = 1, folder: str = "clips", clips: int = 2) -> ClipPlan:
    """Videos of so many clips each."""
    config = DatasetConfig(
        Path("data.toml"),
        number,
        is_video=True,
        directory=Path(folder),
        cache_directory=Path(f"cache{number}"),
        num_repeats=repeats,
    )
    items = tuple(Item(config, Path(folder) / f"{name}.mp4", (name,)) for name in names)
    cut = tuple(
        Clip(item, 5 * part, tuple(range(5 * part, 5 * part + 5)), (64, 64), (64, 64))
        for item in items
        for part in range(clips)
    )
    return ClipPlan(config, items, cut, ())


def names(dataset: CachedDataset) -> set[str]:
    return set(name_files(dataset))


MANY = [f"{number:03d}" for number in range(50)]


def test_both_sides_are_the_whole_and_no_file_is_on_both() -> None:
    whole = CachedDataset([plan(1, MANY, repeats=3)])
    split = split_off(whole, 0.2, seed=0)
    assert names(split.training) | names(split.held_out) == set(MANY)
    assert not names(split.training) & names(split.held_out)
    assert len(names(split.held_out)) == 10
    assert len(split.held_out) == 10 * 2 * 3  # all its clips and repeats
    assert sorted(map(str, split.training.keys + split.held_out.keys)) == sorted(map(str, whole.keys))
    assert find_shared(split.training, split.held_out) == []


def test_a_file_in_two_datasets_is_held_out_of_both() -> None:
    whole = CachedDataset([plan(1, MANY), plan(2, MANY[:10], clips=1), plan(3, MANY[30:], folder="copies")])
    split = split_off(whole, 0.1, seed=0)
    assert not names(split.training) & names(split.held_out)
    for part in split.held_out.plans:
        assert part.clips
    assert split.training.keys[0].item.split("/")[0] == whole.keys[0].item.split("/")[0]


def test_the_choice_is_of_names_and_seed_alone() -> None:
    chosen = names(split_off(CachedDataset([plan(1, MANY)]), 0.1, seed=0).held_out)
    assert (
        names(split_off(CachedDataset([plan(4, MANY[::-1], folder="elsewhere", repeats=2)]), 0.1, seed=0).held_out)
        == chosen
    )
    assert names(split_off(CachedDataset([plan(1, MANY)]), 0.1, seed=1).held_out) != chosen
    # A smaller share is part of a larger, so that nothing that was held out is trained on when more is.
    assert chosen < names(split_off(CachedDataset([plan(1, MANY)]), 0.3, seed=0).held_out)


def test_every_name_is_as_likely_as_another() -> None:
    counts = dict.fromkeys(MANY, 0)
    for seed in range(400):
        for name in choose_names([MANY], 0.1, seed=seed):
            counts[name] += 1
    assert sum(counts.values()) == 400 * 5
    assert min(counts.values()) > 15 and max(counts.values()) < 70


def test_regularisation_is_not_measured_but_does_not_leak_either() -> None:
    subject, known = plan(1, MANY), plan(2, [*MANY[:25], "another"])
    known = replace(known, config=replace(known.config, is_reg=True))
    split = split_off(CachedDataset([subject, known]), 0.2, seed=0)
    assert len(names(split.held_out)) == 10
    assert not split.held_out.plans[1].clips and split.training.plans[1].clips
    assert not names(split.training) & names(split.held_out)
    with pytest.raises(InputError, match="not is_reg"):
        split_off(CachedDataset([known]), 0.2, seed=0)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5])
@pytest.mark.parametrize("sizes", [(2,), (1, 2), (3, 1, 1), (2, 2)])
def test_both_sides_keep_something_of_the_smallest_datasets(share: float, sizes: tuple[int, ...]) -> None:
    for seed in range(20):
        split = split_off(CachedDataset([plan(n, MANY[:size]) for n, size in enumerate(sizes, 1)]), share, seed=seed)
        assert len(split.training) and len(split.held_out)


def test_a_single_file_cannot_be_split() -> None:
    with pytest.raises(InputError, match="needs a dataset with at least two files"):
        split_off(CachedDataset([plan(1, ["only"])]), 0.5, seed=0)


def test_files_that_are_trained_on_too_are_found() -> None:
    one, other = CachedDataset([plan(1, MANY[:3])]), CachedDataset([plan(1, MANY[2:5])])
    assert [Path(path).name for path in find_shared(one, other)] == ["002.mp4"]
    assert find_shared(one, CachedDataset([plan(1, MANY[:3], folder="other")])) == []
