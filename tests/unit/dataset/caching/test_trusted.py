import shutil

import pytest
import torch

from dataset.batching.batches import open_cached, open_trusted
from dataset.caching.cache import latents_path, save_latents, save_text, text_path
from dataset.caching.manifest import Manifest
from dataset.caching.recipe import Recipe, take_fingerprint
from dataset.config import read_config
from dataset.sources import list_items, plan_clips
from tests.unit.dataset.drawing import draw_image, make_clips, write_toml
from wan_train.errors import InputError
from wan_train.storage import read_tensors, save_tensors

TOML = """
[general]
resolution = [64, 48]
enable_bucket = true
[[datasets]]
video_directory = "clips"
cache_directory = "cache/clips"
target_frames = [1, 5]
source_fps = 32
[[datasets]]
image_directory = "stills"
cache_directory = "cache/stills"
num_repeats = 2
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Sources and their caches, ours and one of musubi-tuner's."""
    monkeypatch.chdir(tmp_path)
    make_clips(tmp_path / "clips", {"a_b": 20, "c.d": 12}, fps=32)
    (tmp_path / "stills").mkdir()
    draw_image(tmp_path / "stills/s.one.png", (100, 50))
    (tmp_path / "stills/s.one.txt").write_text("a still")
    (tmp_path / "vae").write_bytes(b"weights")
    for config in read_config(write_toml(tmp_path / "data.toml", TOML)):
        plan = plan_clips(config, list_items(config, allow_missing_captions=False))
        for item in plan.items:
            save_text(item, {item.caption: torch.randn(3, 8)})
        manifest = Manifest(config.cache_directory)
        for clip in plan.clips:
            model, source = take_fingerprint(tmp_path / "vae", manifest), take_fingerprint(clip.item.path, manifest)
            recipe = Recipe(model, "bfloat16", source, clip.start, clip.frames, clip.size)
            save_latents(clip, torch.randn(clip.latent_shape), torch.bfloat16, recipe if clip.start == 0 else None)
    return tmp_path


def trusted():
    return open_trusted(read_config("data.toml", with_sources=False))


def test_the_samples_are_those_that_the_sources_give(folder):
    known = open_cached(read_config("data.toml"), allow_missing_captions=False)
    assert known.num_items == 6
    shutil.rmtree(folder / "clips")
    shutil.rmtree(folder / "stills")
    found = trusted()
    assert set(found.keys) == set(known.keys)
    assert {bucket: len(samples) for bucket, samples in found.buckets.items()} == {
        bucket: len(samples) for bucket, samples in known.buckets.items()
    }
    for key in known.keys:
        assert torch.equal(found[key].latents, known[key].latents)
        assert torch.equal(found[key].context, known[key].context)
    clips = {latents_path(clip): clip for plan in known.plans for clip in plan.clips}
    for clip in (clip for plan in found.plans for clip in plan.clips):
        other = clips[latents_path(clip)]
        assert (clip.frames, clip.size, clip.item.captions) == (other.frames, other.size, other.item.captions)


def test_sources_that_changed_do_not_matter(folder):
    (folder / "clips/a_b.mp4").write_bytes(b"nothing like it")
    assert trusted().num_items == 6


def test_without_the_option_the_sources_must_be_there(folder):
    shutil.rmtree(folder / "clips")
    with pytest.raises(InputError, match="no such folder: clips"):
        read_config("data.toml")


def cut_latents(latents, text):
    latents.write_bytes(latents.read_bytes()[:60])


def cut_text(latents, text):
    text.write_bytes(text.read_bytes()[:60])


def rename(latents, text):
    latents.rename(latents.with_name(latents.name.replace("0064x0048", "0128x0048")))


def empty(latents, text):
    save_tensors(latents, {"other": torch.zeros(1)})


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (cut_latents, "a_b_00000-005_0064x0048_wan.safetensors: truncated"),
        (cut_text, "a_b_wan_te.safetensors is truncated"),
        (lambda latents, text: text.unlink(), "a_b_wan_te.safetensors is missing"),
        (lambda latents, text: save_tensors(text, {"other": torch.zeros(1)}, {"caption1": "x"}), "no embedding"),
        (rename, "size does not match its name"),
        (empty, "no latents"),
    ],
)
def test_what_cannot_be_trained_on_is_named(folder, damage, part):
    cache = folder / "cache/clips"
    damage(cache / "a_b_00000-005_0064x0048_wan.safetensors", cache / "a_b_wan_te.safetensors")
    with pytest.raises(InputError) as raised:
        trusted()
    assert part in str(raised.value)


def test_an_empty_folder_is_an_error(folder):
    shutil.rmtree(folder / "cache/stills")
    with pytest.raises(InputError, match="no latents of images in cache/stills"):
        trusted()


def test_a_flip_that_the_toml_asks_for_must_be_in_the_file(folder):
    write_toml(folder / "data.toml", TOML.replace("num_repeats = 2", "flip_augment = true"))
    with pytest.raises(InputError, match="no latents_flipped"):
        trusted()
    (clip,) = open_trusted(read_config(write_toml(folder / "data.toml", TOML))[1:]).plans[0].clips
    path = latents_path(clip)
    tensors = dict(read_tensors(path))
    tensors |= {name.replace("latents_", "latents_flipped_"): tensor + 0 for name, tensor in tensors.items()}
    save_tensors(path, tensors)
    write_toml(folder / "data.toml", TOML.replace("num_repeats = 2", "flip_augment = true"))
    assert trusted().num_items == 5
    assert text_path(clip.item).is_file()
