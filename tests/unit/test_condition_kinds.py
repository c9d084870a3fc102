"""A new kind of condition is a row: from the cache to the arguments of the model nothing else knows of it."""

from pathlib import Path

import pytest
import torch

from dataset.batching.batches import CachedDataset, collate
from dataset.caching import extras
from dataset.caching.cache import save_latents, save_text
from dataset.config import read_config
from dataset.sources import list_items, plan_clips
from tests.unit.dataset.drawing import draw_image, write_toml
from wan_train.conditions.kinds import KINDS, ConditionKind
from wan_train.models.variants import VARIANTS
from wan_train.training.objective.conditioning import Dropped, conditions_of

TOML = '[[datasets]]\nimage_directory = "stills"\nresolution = [64, 48]\ncache_directory = "cache"\nbatch_size = 2\n'


@pytest.mark.parametrize("shared", [False, True])
def test_a_toy_condition(shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    toy = ConditionKind("toy", "latents_toy", is_shared=shared, is_dropped=not shared)
    monkeypatch.setitem(KINDS, toy.name, toy)
    monkeypatch.setitem(extras.WANTED, toy.name, lambda item: True)
    (tmp_path / "stills").mkdir()
    for name in "ab":
        draw_image(tmp_path / "stills" / f"{name}.png")
        (tmp_path / "stills" / f"{name}.txt").write_text("a still")
    (config,) = read_config(write_toml(tmp_path / "data.toml", TOML))
    plan = plan_clips(config, list_items(config, allow_missing_captions=False))
    made = [torch.full(plan.clips[0].latent_shape, value) for value in (1.0, 2.0)]
    for clip, value in zip(plan.clips, made, strict=True):
        save_latents(clip, torch.zeros(clip.latent_shape), torch.float32, extras={toy.key: value})
        save_text(clip.item, {clip.item.caption: torch.zeros(3, 8)})
    dataset = CachedDataset([plan])
    batch = collate([dataset[0], dataset[1]])
    inputs = conditions_of(
        batch, VARIANTS["t2v-1.3B"], torch.device("cpu"), dropped=Dropped(images=[False, True])
    ).inputs()
    wanted = made[0] if shared else torch.stack([made[0], torch.zeros_like(made[1])])
    assert torch.equal(torch.as_tensor(inputs["toy"]), wanted) and set(inputs) == {"context", "toy"}
