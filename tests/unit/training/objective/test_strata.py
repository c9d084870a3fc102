import contextlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dataset.batching.batches import CachedDataset, open_cached
from dataset.batching.epochs import EpochBatches
from dataset.batching.order import SampleKey
from dataset.caching.cache import save_latents, save_text
from dataset.config import read_config
from dataset.sources import list_items, plan_clips
from tests.unit.dataset.drawing import make_stills, write_toml
from wan_train.training.objective.loss import draw
from wan_train.training.objective.strata import Strata, assign
from wan_train.training.settings import TimestepSettings

TOML = """
[general]
resolution = 32
[[datasets]]
image_directory = "few"
num_repeats = 4
{few}
[[datasets]]
image_directory = "many"
batch_size = 3
enable_bucket = true
{many}
"""
SHAPE = (1, 1, 2, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """few/ has 2 images, many/ 12 in two sizes."""
    folder = tmp_path_factory.mktemp("strata")
    with contextlib.chdir(folder):
        for name, count in (("few", 2), ("many", 12)):
            make_stills(folder / name, count, num_square=7, caption="words")
        for config in read_config(write_toml(folder / "full.toml", TOML.format(few="", many=""))):
            plan = plan_clips(config, list_items(config, allow_missing_captions=False))
            for clip in plan.clips:
                save_latents(clip, torch.zeros(clip.latent_shape), torch.bfloat16)
                save_text(clip.item, {"words": torch.zeros(1, 8)})
    return folder


def opened(folder: Path, monkeypatch: pytest.MonkeyPatch, few: str = "", many: str = "") -> CachedDataset:
    monkeypatch.chdir(folder)
    configs = read_config(write_toml(folder / "data.toml", TOML.format(few=few, many=many)))
    return open_cached(configs, allow_missing_captions=False)


def taken(dataset: CachedDataset, epoch: int) -> dict[str, list[SampleKey]]:
    """What an epoch takes, by folder."""
    batches = EpochBatches(dataset, seed=5)
    batches.set_epoch(epoch)
    found: dict[str, list[SampleKey]] = {}
    for key in (dataset.key_of(pick) for batch in batches for pick in batch):
        found.setdefault(key.item.split("/")[0], []).append(key)
    return found


@pytest.mark.parametrize(
    ("few", "many"), [("", ""), ("weight = 1", "weight = 3"), ("weight = 3", "weight = 2"), ("", "drop_last = true")]
)
def test_every_stratum_is_as_often_in_each_dataset(
    folder: Path, monkeypatch: pytest.MonkeyPatch, few: str, many: str
) -> None:
    dataset = opened(folder, monkeypatch, few, many)
    strata = Strata(dataset, 4, seed=5)
    for epoch in range(1, 6):
        for keys in taken(dataset, epoch).values():
            counts = Counter(strata.strata_of(keys, epoch))
            assert max(counts.values()) - min(counts[n] for n in range(4)) <= (len(keys) % 4 > 0)


def test_noise_levels_lie_in_their_strata_whatever_the_batch_and_the_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = opened(folder, monkeypatch)
    settings = TimestepSettings(num_timestep_buckets=4, min_timestep=200)
    keys = taken(dataset, 2)["many"]

    def levels(keys: list[SampleKey], strata: Strata) -> list[float]:
        return draw(keys, SHAPE, settings, seed=5, epoch=2, strata=strata).t.tolist()

    together = levels(keys, Strata(dataset, 4, seed=5))
    # t runs from 0.2 to 1, each stratum over 0.2 of it.
    assert Counter(int(t / 0.2) for t in together) == {1: 3, 2: 3, 3: 3, 4: 3}
    resumed = Strata(dataset, 4, seed=5)
    resumed.strata_of(taken(dataset, 9)["few"], 9)
    assert [levels([key], resumed)[0] for key in reversed(keys)] == together[::-1]


def test_strata_do_not_depend_on_the_batch_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for epoch in range(3):
        dealt = [
            Strata(dataset, 4, seed=5).strata_of(dataset.keys, epoch)
            for dataset in (opened(folder, monkeypatch), opened(folder, monkeypatch, "batch_size = 5"))
        ]
        assert dealt[0] == dealt[1]


def test_epochs_and_seeds_deal_the_strata_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = opened(folder, monkeypatch)
    dealt = {
        tuple(Strata(dataset, 12, seed=seed).strata_of(dataset.keys, epoch))
        for seed, epoch in ((5, 1), (5, 2), (6, 1), (6, 2))
    }
    assert len(dealt) == 4


@pytest.mark.parametrize(("num_samples", "num_strata"), [(12, 4), (13, 4), (1000, 7), (3, 3), (1, 1)])
def test_counts_differ_by_one_at_most(num_samples: int, num_strata: int) -> None:
    for epoch in range(20):
        counts = Counter(assign(num_samples, num_strata, key="k", epoch=epoch))
        assert set(counts) == set(range(num_strata))
        assert max(counts.values()) - min(counts.values()) == (num_samples % num_strata > 0)


def test_fewer_samples_than_strata_lie_apart_and_take_them_all_in_time() -> None:
    totals = Counter[int]()
    for epoch in range(100):
        places = sorted(assign(3, 10, key="k", epoch=epoch))
        assert all(later - earlier >= 3 for earlier, later in pairwise(places))
        totals.update(places)
    assert set(totals) == set(range(10))
    assert all(27 <= count <= 33 for count in totals.values())
    alone = Counter(assign(1, 10, key="k", epoch=epoch)[0] for epoch in range(10))
    assert max(alone.values()) <= 2


def test_a_sample_meets_every_stratum() -> None:
    met = Counter(assign(8, 4, key="k", epoch=epoch)[0] for epoch in range(400))
    assert set(met) == set(range(4)) and min(met.values()) > 60
