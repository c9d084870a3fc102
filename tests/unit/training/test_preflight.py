"""What training says of caches before a model is loaded."""

from pathlib import Path

import pytest
import torch

from dataset.caching.cache import save_latents, save_text
from dataset.caching.extras import CONTROL
from dataset.config import read_config
from dataset.sources import list_items, plan_clips
from tests.unit.dataset.drawing import draw_image, write_toml
from wan_train.cli import parse
from wan_train.training.preflight import open_dataset, read_configs
from wan_train.training.settings import TrainSettings

TOML = """
[[datasets]]
image_directory = "stills"
resolution = [64, 48]
cache_directory = "cache"
"""


@pytest.mark.parametrize("with_controls", [True, False])
def test_controls_that_no_task_reads_are_told_in_one_line(
    with_controls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("stills", "controls"):
        for name in ("a", "b"):
            (tmp_path / folder).mkdir(exist_ok=True)
            draw_image(tmp_path / folder / f"{name}.png")
            (tmp_path / folder / f"{name}.txt").write_text("a still")
    toml = TOML + 'control_directory = "controls"\n' * with_controls
    (config,) = read_config(write_toml(tmp_path / "data.toml", toml))
    plan = plan_clips(config, list_items(config, allow_missing_captions=False))
    for clip in plan.clips:
        latents = torch.randn(clip.latent_shape)
        save_latents(clip, latents, torch.float32, extras={CONTROL: latents.clone()} if with_controls else {})
        save_text(clip.item, {clip.item.caption: torch.randn(3, 8)})
    words = ("--dataset_config", "data.toml", "--output_dir", "o", "--output_name", "n", "--trust_cache")
    settings = parse(TrainSettings, words)
    assert open_dataset(read_configs("data.toml", settings), settings).num_items == 2
    told = capsys.readouterr().err
    assert told.count("WARNING") == with_controls
    assert ("2 of 2 clips have a control in their caches (latents_control), which --task t2v-14B" in told) == (
        with_controls
    )
