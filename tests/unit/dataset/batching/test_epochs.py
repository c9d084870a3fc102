import contextlib
import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from dataset.batching.batches import collate, open_cached
from dataset.batching.epochs import EpochBatches, epoch_sizes
from dataset.caching.cache import read_text, save_latents, save_text
from dataset.config import read_config
from dataset.sources import list_items, plan_clips
from dataset.summary import metadata, summarise
from tests.unit.dataset.drawing import make_stills, write_toml
from wan_train.errors import InputError

TOML = """
[general]
resolution = 32
caption_variants = "lines"
[[datasets]]
image_directory = "few"
batch_size = 2
num_repeats = 2
{few}
[[datasets]]
image_directory = "many"
batch_size = 3
enable_bucket = true
{many}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """few/ has 3 images, many/ 14 in two sizes; each has two captions."""
    folder = tmp_path_factory.mktemp("epochs")
    with contextlib.chdir(folder):
        for name, count in (("few", 3), ("many", 14)):
            caption = f"{name} {{number}}\n{name} {{number}} again"
            make_stills(folder / name, count, num_square=10, caption=caption)
        for config in read_config(
            write_toml(folder / "full.toml", TOML.format(few="caption_dropout_rate=0.5", many=""))
        ):
            plan = plan_clips(config, list_items(config, allow_missing_captions=False))
            for clip in plan.clips:
                save_latents(clip, torch.zeros(clip.latent_shape), torch.bfloat16)
                texts = [*clip.item.captions, ""]
                save_text(clip.item, {text: torch.full((n + 1, 8), float(len(text))) for n, text in enumerate(texts)})
    return folder


@pytest.fixture
def opened(folder, monkeypatch):
    def opened(few="", many=""):
        monkeypatch.chdir(folder)
        configs = read_config(write_toml(folder / "data.toml", TOML.format(few=few, many=many)))
        return open_cached(configs, allow_missing_captions=False)

    return opened


def epochs_of(dataset, epochs, **options):
    """For each epoch its batches of (key, variant)."""
    batches = EpochBatches(dataset, seed=5, **options)
    for epoch in epochs:
        batches.set_epoch(epoch)
        yield [[(dataset.key_of(pick), pick.variant) for pick in batch] for batch in batches]


def folders(batches):
    return Counter(key.item.split("/")[0] for batch in batches for key, _ in batch)


def test_without_weights_an_epoch_takes_everything_once(opened):
    dataset = opened()
    for batches in epochs_of(dataset, range(3)):
        assert sorted(map(repr, (key for batch in batches for key, _ in batch))) == sorted(map(repr, dataset.keys))


def test_weights_share_an_epoch_of_the_same_length(opened):
    dataset = opened("weight = 3", "weight = 1")
    assert dataset.num_items == 20
    assert list(epoch_sizes(dataset).values()) == [15, 1, 4]
    assert "3 clips, num_repeats 2, weight 3" in summarise(dataset)
    assert [table["num_train_items"] for table in json.loads(metadata(dataset, list(dataset.configs.values())))] == [
        15,
        5,
    ]
    for batches in epochs_of(dataset, range(6)):
        assert folders(batches) == {"few": 15, "many": 5}
        keys = [key for batch in batches for key, _ in batch]
        assert len(set(keys)) == 20, "a sample that comes twice in an epoch is another repeat, with noise of its own"


def test_a_dataset_without_a_weight_counts_as_1(opened):
    (batches,) = epochs_of(opened("weight = 3"), [0])
    assert folders(batches) == {"few": 15, "many": 5}


def test_a_small_weight_loses_nothing_over_the_epochs(opened):
    dataset = opened("weight = 3", "weight = 1")
    seen = Counter(
        key.item
        for batches in epochs_of(dataset, range(20))
        for batch in batches
        for key, _ in batch
        if "many" in key.item
    )
    assert len(seen) == 14
    for size in ("0032x0032", "0016x0064"):
        counts = [count for item, count in seen.items() if size in item]
        assert max(counts) - min(counts) <= 1


def test_a_weight_far_below_a_sample_still_gets_one_of_each_bucket(opened):
    (batches,) = epochs_of(opened("weight = 1000", "weight = 0.001"), [0])
    assert folders(batches) == {"few": 18, "many": 2}


def test_drop_last_leaves_out_small_batches_and_no_item_for_ever(opened):
    dataset = opened(many="drop_last = true")
    seen = set()
    for batches in epochs_of(dataset, range(30)):
        # few: 6 samples by two; many: 10 and 4 by three, of which one each is left over.
        assert Counter((batch[0][0].item.split("/")[0], len(batch)) for batch in batches) == {
            ("few", 2): 3,
            ("many", 3): 4,
        }
        seen |= {key for batch in batches for key, _ in batch}
    assert seen == set(dataset.keys)
    assert "4 samples in 1 batches of 3" in summarise(dataset)


def test_dropping_everything_is_an_error(opened):
    dataset = opened("drop_last = true", "drop_last = true")
    dataset.configs = {number: replace(config, batch_size=100) for number, config in dataset.configs.items()}
    with pytest.raises(InputError, match="drop_last leaves no batch"):
        EpochBatches(dataset, seed=1)


def test_each_time_one_caption_is_drawn_and_some_are_dropped(opened):
    dataset = opened("caption_dropout_rate = 0.5")
    drawn = {"few": Counter(), "many": Counter()}
    for batches in epochs_of(dataset, range(200)):
        for key, variant in (one for batch in batches for one in batch):
            drawn[key.item.split("/")[0]][variant] += 1
    assert drawn["few"][None] == pytest.approx(600, abs=80)
    assert drawn["few"][0] == pytest.approx(300, abs=70)
    assert drawn["many"].keys() == {0, 1}
    assert drawn["many"][0] == pytest.approx(1400, abs=130)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_taken_does_not_depend_on_ranks_and_workers(opened, num_ranks, num_workers):
    dataset = opened("caption_dropout_rate = 0.5\nweight = 2", "drop_last = true")
    whole = EpochBatches(dataset, seed=9)
    whole.set_epoch(3)
    expected = [[(dataset.key_of(pick), pick.variant) for pick in batch] for batch in whole]
    found = []
    for rank in range(num_ranks):
        random.seed(rank)
        batches = EpochBatches(dataset, seed=9, rank=rank, num_ranks=num_ranks)
        batches.set_epoch(3)
        picks = list(batches)
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=num_workers)
        share = []
        for taken, batch in zip(picks, loader, strict=True):
            assert batch.keys == tuple(map(dataset.key_of, taken))
            for pick, context in zip(taken, batch.context, strict=True):
                assert context.shape[0] == (3 if pick.variant is None else pick.variant + 1)
            share.append([(key, pick.variant) for key, pick in zip(batch.keys, taken, strict=True)])
        found.append(share)
    merged = [batch for step in zip(*found, strict=True) for batch in step]
    assert merged[: len(expected)] == expected
    assert len(merged) == math.ceil(len(expected) / num_ranks) * num_ranks


def test_positions_and_keys_alone_take_the_first_caption(opened):
    dataset = opened()
    item = dataset.plans[0].items[0]
    assert torch.equal(dataset[0].context, read_text(item))
    assert torch.equal(dataset[dataset.keys[0]].context, read_text(item, 0))
