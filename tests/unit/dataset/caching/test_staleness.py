import dataclasses
import os

import pytest
import torch

from dataset.caching.cache import latents_path, save_latents, save_text, text_path
from dataset.caching.manifest import Manifest
from dataset.caching.recipe import RECIPE_KEY, Fingerprint, Recipe, is_same, read_recipe, take_fingerprint, write_recipe
from dataset.caching.staleness import Staleness, latents_state, list_orphans, text_state
from dataset.config import DatasetConfig
from dataset.items import Clip, Item
from wan_train.storage import read_header, read_tensors, save_tensors


@pytest.fixture
def vae(tmp_path):
    path = tmp_path / "vae.pth"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def manifest(tmp_path):
    return Manifest(tmp_path / "cache")


@pytest.fixture
def clip(tmp_path, vae, manifest):
    """A clip whose latents are cached with their recipe."""
    (tmp_path / "a.mp4").write_bytes(b"frames")
    config = DatasetConfig(tmp_path / "data.toml", 1, True, tmp_path, tmp_path / "cache")
    clip = Clip(Item(config, tmp_path / "a.mp4", ("a press",)), 2, (2, 3, 5, 6, 8), (64, 48), (640, 480))
    save(clip, vae, manifest)
    return clip


def save(clip, vae, manifest):
    recipe = Recipe(
        model=take_fingerprint(vae, manifest),
        dtype="bfloat16",
        source=take_fingerprint(clip.item.path, manifest),
        start=clip.start,
        frames=clip.frames,
        size=clip.size,
    )
    save_latents(clip, torch.zeros(clip.latent_shape), torch.bfloat16, recipe)


def test_a_recipe_is_read_as_it_was_written():
    print_of = Fingerprint("a.mp4", 3, 4, "abc")
    recipe = Recipe(print_of, "float16", print_of, 7, (7, 9), (64, 48), {"mask": print_of})
    assert read_recipe(write_recipe(recipe)) == recipe
    for text in ("", "[]", "{}", '{"version": 2}', write_recipe(recipe).replace('"size"', '"sise"')):
        assert read_recipe(text) is None


def test_our_files_carry_their_recipe_and_load_as_before(clip):
    header = read_header(latents_path(clip))
    recipe = read_recipe(header.metadata[RECIPE_KEY])
    assert recipe.frames == (2, 3, 5, 6, 8) and recipe.size == (64, 48) and recipe.source.name == "a.mp4"
    assert list(header.shapes) == ["latents_2x6x8_bfloat16"]


def test_what_was_made_of_the_same_is_up_to_date(clip, manifest, vae):
    assert latents_state(clip, manifest, dtype=torch.bfloat16, model=vae).kind is Staleness.UP_TO_DATE
    assert latents_state(clip, manifest).usable


def change_source(clip, vae):
    clip.item.path.write_bytes(b"others")
    os.utime(clip.item.path, ns=(5, 5))


def lengthen_source(clip, vae):
    clip.item.path.write_bytes(b"longer than it was")


def change_vae(clip, vae):
    vae.write_bytes(b"other weights")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_source, "source changed"),
        (lengthen_source, "source changed"),
        (change_vae, "different VAE (vae.pth)"),
        (lambda clip, vae: dataclasses.replace(clip, frames=(2, 3, 4, 5, 6)), "different frames"),
        (lambda clip, vae: dataclasses.replace(clip, source_size=(320, 240)), ""),
    ],
)
def test_what_was_made_of_something_else_is_stale_and_says_why(clip, manifest, vae, change, reason):
    clip = change(clip, vae) or clip
    state = latents_state(clip, manifest, dtype=torch.bfloat16, model=vae)
    assert (state.kind, state.reason) == (Staleness.STALE if reason else Staleness.UP_TO_DATE, reason)


def test_a_cache_is_stale_where_its_file_is_read_in_another_way_now(clip, manifest):
    """A cache that is older than `reading` says nothing, and fits files that are read as they always were."""
    path = latents_path(clip)
    text = read_header(path).metadata[RECIPE_KEY].replace(',"reading":""', "")
    assert "reading" not in text
    save_tensors(path, dict(read_tensors(path)), read_header(path).metadata | {RECIPE_KEY: text})
    assert latents_state(clip, manifest).kind is Staleness.UP_TO_DATE
    state = latents_state(dataclasses.replace(clip, reading="pixels 64:45"), manifest)
    assert state.kind is Staleness.STALE
    assert state.reason == "source is now processed differently (then as decoded, now pixels 64:45)"


def test_another_precision_is_stale_for_caching_alone(clip, manifest, vae):
    state = latents_state(clip, manifest, dtype=torch.float32, model=vae)
    assert str(state) == "a_00002-005_0064x0048_wan.safetensors: bfloat16, not float32"
    assert latents_state(clip, manifest).usable


def test_an_image_in_another_bucket_is_stale(tmp_path, manifest, vae):
    draw = tmp_path / "a.png"
    draw.write_bytes(b"an image")
    config = DatasetConfig(tmp_path / "data.toml", 1, False, tmp_path, tmp_path / "cache")
    image = Clip(Item(config, draw, ("",)), 0, (0,), (64, 48), (640, 480))
    save(image, vae, manifest)
    assert latents_state(image, manifest).usable
    assert latents_state(dataclasses.replace(image, size=(32, 48)), manifest).kind is Staleness.STALE
    assert latents_state(dataclasses.replace(image, size=(48, 64)), manifest).kind is Staleness.STALE


def test_copies_with_another_time_are_the_same_and_hashed_once(clip, vae, tmp_path, monkeypatch):
    for path in (clip.item.path, vae):
        os.utime(path, ns=(5, 5))
    for _ in range(2):
        with Manifest(tmp_path / "cache") as manifest:
            assert latents_state(clip, manifest, model=vae).kind is Staleness.UP_TO_DATE
        monkeypatch.setattr("dataset.caching.recipe.file_hash", None)


def test_nothing_is_hashed_or_opened_that_is_known(clip, vae, tmp_path, monkeypatch):
    with Manifest(tmp_path / "cache") as manifest:
        latents_state(clip, manifest, model=vae)
    monkeypatch.setattr("dataset.caching.recipe.file_hash", None)
    monkeypatch.setattr("dataset.caching.staleness.read_header", None)
    assert latents_state(clip, Manifest(tmp_path / "cache"), model=vae).kind is Staleness.UP_TO_DATE


def test_half_a_file_and_none(clip, manifest):
    path = latents_path(clip)
    path.write_bytes(path.read_bytes()[:100])
    assert latents_state(clip, manifest).kind is Staleness.TRUNCATED
    path.unlink()
    assert latents_state(clip, manifest).kind is Staleness.MISSING


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        ({"architecture": "wan", "width": "64", "height": "48", "frame_count": "5"}, Staleness.FOREIGN),
        ({}, Staleness.FOREIGN),
        ({"architecture": "hv"}, Staleness.STALE),
        ({"architecture": "wan", "frame_count": "9"}, Staleness.STALE),
        ({"architecture": "wan", RECIPE_KEY: '{"version": 99}'}, Staleness.STALE),
    ],
)
def test_files_without_a_recipe_are_adopted_where_they_fit(clip, manifest, metadata, kind):
    path = latents_path(clip)
    save_tensors(path, dict(read_tensors(path)), metadata)
    assert latents_state(clip, manifest, dtype=torch.bfloat16).kind is kind
    other = dataclasses.replace(clip, frames=(2, 3, 5, 6, 8, 9, 10, 11, 12))
    path.rename(latents_path(other))
    assert latents_state(other, manifest).kind is Staleness.STALE


def test_text_is_stale_for_another_caption_or_encoder(clip, manifest, vae):
    item = clip.item
    save_text(item, {"a press": torch.zeros(3, 8)}, Recipe(take_fingerprint(vae, manifest), "bfloat16"))
    assert text_state(item, manifest, model=vae).kind is Staleness.UP_TO_DATE
    assert text_state(dataclasses.replace(item, captions=("a fox",)), manifest).reason == "different caption"
    vae.write_bytes(b"other weights")
    assert text_state(item, manifest, model=vae).reason == "different text encoder (vae.pth)"
    assert text_state(item, manifest).usable
    save_text(item, {"a press": torch.zeros(3, 8)})
    assert text_state(item, manifest, model=vae).kind is Staleness.FOREIGN
    text_path(item).write_bytes(b"half")
    assert text_state(item, manifest).kind is Staleness.TRUNCATED


def test_orphans_are_the_caches_of_one_kind_that_nothing_plans(clip, tmp_path):
    folder = tmp_path / "cache"
    old = "old_00000-005_0064x0048_wan.safetensors"
    for name in (old, "old_wan_te.safetensors", "my_lora_wan.safetensors", f".{old}", "old_0064x0048_hv.safetensors"):
        (folder / name).write_bytes(b"")
    planned = [latents_path(clip)]
    assert list_orphans(folder, planned, is_text=False) == [folder / old]
    assert list_orphans(folder, planned, is_text=True) == [folder / "old_wan_te.safetensors"]
    assert list_orphans(tmp_path / "none", [], is_text=True) == []


def test_a_folder_of_frames_has_a_fingerprint_too(tmp_path, manifest):
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(3):
        (frames / f"{number}.png").write_bytes(b"frame %d" % number)
    taken = take_fingerprint(frames, manifest)
    assert taken.size == 21 and is_same(taken, frames, manifest)
    (frames / "2.png").rename(frames / "3.png")
    os.utime(frames / "3.png", ns=(9, 9))
    assert not is_same(taken, frames, manifest)
