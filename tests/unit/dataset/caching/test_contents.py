"""What samples are made of, by their caches."""

from pathlib import Path

import pytest
import torch

from dataset.batching.batches import CachedDataset
from dataset.caching.cache import save_latents, save_text
from dataset.caching.contents import Content, changes, read_contents
from dataset.caching.recipe import Fingerprint, Recipe
from dataset.config import DatasetConfig
from dataset.items import Clip, Item
from dataset.sources import ClipPlan

NAME = "cache/dog_0064x0064_wan"
VAE = Fingerprint("vae.pth", 10, 1, "vae")
T5 = Recipe(Fingerprint("t5.pth", 10, 1, "t5"), "bfloat16")
DOG = Recipe(VAE, "float32", Fingerprint("dog.png", 5, 7, "dog"), frames=(0,), size=(64, 64))


def contents(folder: Path, *, recipe: Recipe | None = DOG, text: Recipe | None = T5, caption: str = "a dog") -> Content:
    """Of the one sample of a dataset with these caches."""
    config = DatasetConfig(folder / "d.toml", 1, False, folder, folder / "cache", resolution=(64, 64))
    clip = Clip(Item(config, folder / "dog.png", (caption,)), 0, (0,), (64, 64), (64, 64))
    save_latents(clip, torch.zeros(clip.latent_shape), torch.float32, recipe)
    save_text(clip.item, {caption: torch.zeros(2, 4)}, text)
    return read_contents(CachedDataset([ClipPlan(config, (clip.item,), (clip,), ())]))[NAME]


def test_contents_are_what_caches_were_made_of(tmp_path: Path) -> None:
    plain = contents(tmp_path)
    assert all(plain) and contents(tmp_path) == plain
    elsewhere = Recipe(VAE, "float32", Fingerprint("other.png", 5, 99, "dog"), frames=(0,), size=(64, 64))
    assert contents(tmp_path, recipe=elsewhere) == plain
    for changed, field in (
        (Recipe(VAE, "float32", Fingerprint("dog.png", 5, 7, "cat"), frames=(0,), size=(64, 64)), "latents"),
        (Recipe(VAE, "float32", DOG.source, frames=(1,), size=(64, 64)), "latents"),
        (Recipe(VAE, "float32", DOG.source, frames=(0,), size=(64, 64), extras={"mask": VAE}), "latents"),
        (Recipe(Fingerprint("vae.pth", 10, 1, "b"), "float32", DOG.source, frames=(0,), size=(64, 64)), "latents"),
    ):
        assert contents(tmp_path, recipe=changed)._replace(**{field: plain.latents}) == plain
        assert contents(tmp_path, recipe=changed) != plain
    other = contents(tmp_path, caption="a cat")
    assert other.captions != plain.captions and other._replace(captions=plain.captions) == plain
    encoder = contents(tmp_path, text=Recipe(Fingerprint("t5.pth", 10, 1, "small"), "bfloat16"))
    assert encoder.encoder != plain.encoder and encoder._replace(encoder=plain.encoder) == plain


@pytest.mark.parametrize("own", [True, False])
def test_caches_of_other_tools_do_not_say_what_they_were_made_of(tmp_path: Path, own: bool) -> None:
    plain, foreign = contents(tmp_path), contents(tmp_path, recipe=None, text=None)
    assert (foreign.latents, foreign.encoder, foreign.captions) == ("", "", plain.captions)
    before, now = (plain, foreign) if own else (foreign, plain)
    assert changes({NAME: before}, {NAME: now}) == []
    assert changes({NAME: before}, {NAME: now._replace(captions="x")}) == ["1 file with different captions (dog)"]


def test_samples_of_a_renamed_cache_folder_are_told_with_the_folder() -> None:
    cat, content = "cat_0064x0064_wan", Content("a", "b", "c")
    before = {f"old/{cat}": content, NAME: content}
    assert changes(before, {f"new/{cat}": content, NAME.replace("dog", "cow"): content}) == [
        "2 files that are new (new/cat, cow)",
        "2 files that are missing (old/cat, dog)",
    ]
