"""What training a control model will need is told from its inputs, a camera's map and VACE's references among them."""

from pathlib import Path

import torch
from torch import Tensor

from dataset.batching.batches import Batch
from dataset.batching.order import SampleKey
from tests.tiny.control import make_control_models
from wan_train.cli import parse
from wan_train.conditions.camera import camera_path
from wan_train.training.needs import needs_of
from wan_train.training.settings import TrainSettings


def needed(folder: Path, task: str, kind: str, **extras: Tensor) -> int:
    words = ("--task", task, "--dit", str(folder / f"{kind}.safetensors"), "--network_module", "networks.full")
    settings = parse(TrainSettings, [*words, *("--dataset_config", "d", "--output_dir", "o", "--output_name", "n")])
    assert isinstance(settings, TrainSettings)
    given = Batch((SampleKey("a", 0),), torch.zeros(1, 16, 2, 8, 8), [torch.zeros(4, 64)], extras=extras)
    return needs_of(settings, given).activations.device


def test_inputs_count(tmp_path: Path) -> None:
    make_control_models(tmp_path)
    alone, one, two = (
        needed(tmp_path, "vace-1.3B", "vace", vace_context=torch.zeros(1, 96, n + 2, 8, 8)) for n in range(3)
    )
    assert alone < one < two
    entries = camera_path("Left", 5)[None]
    camera = needed(tmp_path, "fun-camera-A14B", "fun-camera-A14B", camera=entries)
    assert camera > needed(tmp_path, "fun-inp-A14B", "fun-inp-A14B", image_latents=torch.zeros(1, 20, 2, 8, 8))
