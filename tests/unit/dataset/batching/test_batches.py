import contextlib
import json
import random
import shutil
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from dataset.batching.batches import CachedDataset, collate, open_cached
from dataset.batching.epochs import EpochBatches
from dataset.batching.order import SampleKey
from dataset.caching.cache import latents_path, save_latents, save_text, text_path
from dataset.config import read_config
from dataset.sources import list_items, plan_clips
from dataset.summary import metadata, summarise
from tests.unit.dataset.drawing import draw_image, draw_video, make_clips, write_toml
from wan_train.errors import InputError

TOML = """
[general]
resolution = [64, 48]
enable_bucket = true
[[datasets]]
video_directory = "one/clips"
cache_directory = "one/cache"
target_frames = [1, 5]
batch_size = 2
num_repeats = 2
[[datasets]]
image_directory = "stills"
cache_directory = "two/cache"
batch_size = 3
"""


def make_cache(folder):
    """Draw sources, and write caches of small numbers for what the TOML says of them."""
    make_clips(folder / "one/clips", {"a": 9, "b": 5, "c": 2})
    draw_video(folder / "one/clips/d.mp4", 9, size=(48, 64))
    (folder / "one/clips/d.txt").write_text("upright")
    (folder / "stills").mkdir()
    for number in range(4):
        draw_image(folder / f"stills/{number}.png")
        (folder / f"stills/{number}.txt").write_text(f"still {number}")
    configs = read_config(write_toml(folder / "data.toml", TOML))
    for config in configs:
        plan = plan_clips(config, list_items(config, allow_missing_captions=False))
        for position, item in enumerate(plan.items):
            save_text(item, {item.caption: torch.full((3 + position, 8), float(position))})
        for position, clip in enumerate(plan.clips):
            save_latents(clip, torch.full(clip.latent_shape, float(position)), torch.bfloat16)
    return configs


@pytest.fixture(scope="module")
def cached_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    with contextlib.chdir(folder):
        make_cache(folder)
    return folder


@pytest.fixture
def folder(cached_folder, tmp_path, monkeypatch):
    """A copy to spoil, as the working folder."""
    shutil.copytree(cached_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def configs(folder):
    return read_config("data.toml")


@pytest.fixture
def dataset(configs) -> CachedDataset:
    return open_cached(configs, allow_missing_captions=False)


def keys_of(dataset, batches):
    return [[dataset.key_of(pick) for pick in batch] for batch in batches]


def test_every_clip_comes_as_often_as_it_repeats(dataset):
    names = Counter(key.item for key in dataset.keys)
    assert names == {
        "one/cache/a_00000-001_0064x0048_wan": 2,
        "one/cache/a_00000-005_0064x0048_wan": 2,
        "one/cache/b_00000-001_0064x0048_wan": 2,
        "one/cache/b_00000-005_0064x0048_wan": 2,
        "one/cache/c_00000-001_0064x0048_wan": 2,
        "one/cache/d_00000-001_0048x0064_wan": 2,
        "one/cache/d_00000-005_0048x0064_wan": 2,
        "two/cache/0_0064x0048_wan": 1,
        "two/cache/1_0064x0048_wan": 1,
        "two/cache/2_0064x0048_wan": 1,
        "two/cache/3_0064x0048_wan": 1,
    }
    assert dataset.num_items == len(dataset) == len(set(dataset.keys)) == 18


def test_keys_do_not_depend_on_where_the_data_is(dataset, cached_folder, monkeypatch):
    monkeypatch.chdir(cached_folder)
    elsewhere = open_cached(read_config("data.toml"), allow_missing_captions=False)
    assert elsewhere.keys == dataset.keys


def test_one_cache_folder_is_called_by_its_own_name(configs):
    alone = open_cached(configs[:1], allow_missing_captions=False)
    assert alone.keys[0] == SampleKey("cache/a_00000-001_0064x0048_wan", 0)


def test_a_sample_is_what_was_cached(dataset):
    key = SampleKey("one/cache/b_00000-005_0064x0048_wan", 1)
    sample = dataset[key]
    assert sample.key == key == dataset[dataset.keys.index(key)].key
    assert sample.latents.dtype == torch.bfloat16
    assert torch.equal(sample.latents, torch.full((16, 2, 6, 8), 3.0, dtype=torch.bfloat16))
    assert torch.equal(sample.context, torch.full((4, 8), 1.0, dtype=torch.bfloat16))


def test_batches_hold_one_dataset_size_and_length(dataset):
    batches = keys_of(dataset, EpochBatches(dataset, seed=1))
    assert len(batches) == len(EpochBatches(dataset, seed=1))
    for batch in batches:
        assert len({(key.item.split("/")[0], key.item.split("_", 1)[1]) for key in batch}) == 1
    assert sorted(key for batch in batches for key in map(repr, batch)) == sorted(map(repr, dataset.keys))
    sizes = Counter((batch[0].item.split("/")[0], len(batch)) for batch in batches)
    # Videos: 6 + 4 + 2 + 2 samples by two; images: 4 by three, the last batch smaller.
    assert sizes == {("one", 2): 7, ("two", 3): 1, ("two", 1): 1}


def test_order_is_keyed_by_seed_and_epoch_alone(dataset):
    def epoch(seed, number):
        batches = EpochBatches(dataset, seed=seed)
        batches.set_epoch(number)
        return list(batches)

    random.seed(1)
    first = epoch(42, 0)
    random.seed(2)
    state = random.getstate()
    assert epoch(42, 0) == first
    assert random.getstate() == state
    assert list(EpochBatches(dataset, seed=42)) == first
    others = [epoch(42, 1), epoch(43, 0), epoch(4, 20)]
    assert all(other != first for other in others)
    # Buckets are mixed, and mixed anew in each epoch.
    orders = {
        tuple(dataset.key_of(batch[0]).item.split("_", 1)[1] for batch in batches) for batches in [first, *others]
    }
    assert len(orders) == 4
    # Items change places within their bucket, not only whole batches.
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in others[0]}


@pytest.mark.parametrize("num_ranks", [2, 4, 25])
def test_processes_share_the_order_of_one(dataset, num_ranks):
    whole = list(EpochBatches(dataset, seed=7))
    shares = [EpochBatches(dataset, seed=7, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    taken = [list(share) for share in shares]
    assert {len(share) for share in shares} == {len(batches) for batches in taken} == {-(-len(whole) // num_ranks)}
    merged = [batch for step in zip(*taken, strict=True) for batch in step]
    assert merged[: len(whole)] == whole
    rest = merged[len(whole) :]
    assert rest == (whole * num_ranks)[: len(rest)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_yields_stacked_batches(dataset, num_workers):
    batches = EpochBatches(dataset, seed=3)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=num_workers)
    loaded = list(loader)
    assert [list(batch.keys) for batch in loaded] == keys_of(dataset, batches)
    for batch in loaded:
        assert batch.latents.shape[:2] == (len(batch.keys), 16)
        for key, latents, context in zip(batch.keys, batch.latents, batch.context, strict=True):
            assert torch.equal(latents, dataset[key].latents)
            assert torch.equal(context, dataset[key].context)


def test_a_pinned_batch_is_the_same_batch_with_every_tensor_pinned(dataset, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    batch = collate([dataset[0], dataset[1]])
    copy = batch.pin_memory()
    assert len(pinned) == 3 and copy.keys == batch.keys
    assert torch.equal(copy.latents, batch.latents) and torch.equal(copy.context[1], batch.context[1])


def test_missing_latents_name_the_command(folder, configs):
    (folder / "one/cache/a_00000-005_0064x0048_wan.safetensors").unlink()
    with pytest.raises(InputError) as raised:
        open_cached(configs, allow_missing_captions=False)
    message = str(raised.value)
    assert "1 of 11 latent caches" in message and "a_00000-005_0064x0048_wan.safetensors" in message
    assert "python wan_cache_latents.py --dataset_config data.toml --vae ..." in message
    assert "text_encoder" not in message


def test_changed_captions_name_the_command(folder, configs):
    (folder / "stills/2.txt").write_text("another still")
    with pytest.raises(InputError) as raised:
        open_cached(configs, allow_missing_captions=False)
    message = str(raised.value)
    assert "1 of 8 text caches" in message and "2_wan_te.safetensors" in message
    assert "python wan_cache_text_encoder_outputs.py --dataset_config data.toml --t5 ..." in message
    assert "wan_cache_latents" not in message


def test_half_a_file_is_missing(dataset, configs):
    clip = dataset.plans[0].clips[0]
    path = latents_path(clip)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="1 of 11 latent caches"):
        open_cached(configs, allow_missing_captions=False)


def test_training_reads_what_the_toml_says_and_not_what_lies_there(folder, configs, dataset):
    shutil.copy(latents_path(dataset.plans[1].clips[0]), folder / "two/cache/foreign_0064x0048_wan.safetensors")
    shutil.copy(text_path(dataset.plans[1].items[0]), folder / "two/cache/foreign_wan_te.safetensors")
    (folder / "stills/3.png").unlink()
    keys = open_cached(configs, allow_missing_captions=False).keys
    assert keys == [key for key in dataset.keys if "/3_" not in key.item]


def test_another_resolution_needs_other_caches(folder):
    (folder / "data.toml").write_text(TOML.replace("[64, 48]", "[96, 64]"))
    with pytest.raises(InputError, match="11 of 11 latent caches"):
        open_cached(read_config("data.toml"), allow_missing_captions=False)


def test_clips_too_short_are_named_when_training_opens(folder, configs, capsys):
    make_clips(folder / "one/clips", {"e": 3})
    text = TOML.replace("[1, 5]", "[5]")
    open_args = read_config(write_toml(folder / "data.toml", text))
    open_cached(open_args, allow_missing_captions=False)
    assert "2 of 5 videos give no clip" in (error := capsys.readouterr().err)
    assert "c.mp4, e.mp4" in error


def test_the_log_tells_buckets_and_batches(dataset):
    text = summarise(dataset)
    assert "4 videos, 7 clips, num_repeats 2" in text
    assert "64 wide, 48 high, 5 frames: 4 samples in 2 batches of 2" in text
    assert "64 wide, 48 high, 1 frames: 4 samples in 2 batches of 3" in text


def test_metadata_tells_settings_and_no_paths(dataset, configs, folder):
    videos, images = json.loads(metadata(dataset, configs))
    assert (videos["video_directory"], videos["num_train_items"], videos["num_repeats"]) == ("clips", 14, 2)
    assert (videos["resolution"], videos["target_frames"], videos["frame_extraction"]) == ([64, 48], [1, 5], "head")
    assert (images["image_directory"], images["num_train_items"]) == ("stills", 4)
    assert str(folder) not in metadata(dataset, configs)
