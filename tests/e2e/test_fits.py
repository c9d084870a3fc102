"""A run that does not fit on the device is refused in one line before a weight is read; one that fits runs."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from generate import main as generate_main
from generate import needs as generate_needs
from tests.tiny.make import DIT, SIZE, T5, VAE
from wan_train import assemble
from wan_train.plan import Bytes
from wan_train.training import needs as training_needs

Tool = Callable[..., None]
GIB = 1 << 30
LITTLE, ENOUGH = Bytes(1 << 20, 64 * GIB), Bytes(8 * GIB, 64 * GIB)


class Device:
    """A stand-in for a GPU: its free memory is asked, and everything is computed on the CPU. `reads` are the weight
    files that were read."""

    def __init__(self, patch: pytest.MonkeyPatch, module: Any, free: Bytes) -> None:
        self.reads: list[object] = []
        read = assemble.read_tensors
        patch.setattr(module, "free_memory", lambda device: free)
        patch.setattr(assemble, "read_tensors", lambda source: (self.reads.append(source), read(source))[1])


@pytest.fixture(scope="module")
def cached(tiny: Path, tmp_path_factory: pytest.TempPathFactory, run_here: Tool) -> Path:
    folder = tmp_path_factory.mktemp("fits") / "all"
    shutil.copytree(tiny, folder)
    data = folder / "data.toml"
    data.write_text(data.read_text().replace(str(tiny), str(folder)))
    run_here("wan_cache_latents.py", "--dataset_config", data, "--vae", folder / VAE)
    run_here("wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--t5", folder / T5)
    return folder


@pytest.mark.parametrize(("free", "expect"), [(LITTLE, 2), (ENOUGH, 0)], ids=["little", "enough"])
def test_a_lora_run_asks_before_loading(
    cached: Path,
    run_here: Tool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: Bytes,
    expect: int,
) -> None:
    device = Device(monkeypatch, training_needs, free)
    monkeypatch.setattr(training_needs, "launched_device", lambda: torch.device("cuda:0"))
    command = [
        *("--task", "t2v-1.3B", "--dit", cached / DIT, "--dataset_config", cached / "data.toml"),
        *("--mixed_precision", "no", "--max_data_loader_n_workers", 0, "--max_train_steps", 1, "--log_with", "none"),
        *("--output_dir", cached / f"out{expect}", "--output_name", "name", "--blocks_to_swap", 1),
        "--gradient_checkpointing",
    ]
    run_here("wan_train_network.py", *command, expect=expect)
    told = capsys.readouterr().err
    assert "training needs " in told and " GiB of LoRA" in told
    assert bool(device.reads) == (expect == 0)
    (refused,) = [line for line in told.splitlines() if "not enough memory" in line] or [""]
    assert ("not enough memory on cuda:0: needs 0." in refused) == (expect == 2)
    if expect:
        assert "0.00 GiB free" in refused and "To reduce it: " in refused
        assert "--fp8_base --fp8_scaled" in refused and "--gradient_checkpointing," not in refused


@pytest.mark.parametrize(("free", "expect"), [(LITTLE, 2), (ENOUGH, 0)], ids=["little", "enough"])
def test_the_generator_asks_before_loading(
    tiny: Path,
    tmp_path: Path,
    run_here: Tool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: Bytes,
    expect: int,
) -> None:
    device = Device(monkeypatch, generate_needs, free)
    asked = partial(on_gpu, generate_needs.check_needs)
    monkeypatch.setattr(generate_main, "check_needs", asked)
    command = [
        *("--task", "t2v-1.3B", "--dit", tiny / DIT, "--vae", tiny / VAE, "--t5", tiny / T5, "--device", "cpu"),
        *("--video_size", *SIZE, "--video_length", 5, "--infer_steps", 1, "--prompt", "a blue square moves down"),
        *("--save_path", tmp_path / "video.mp4", "--blocks_to_swap", 1),
    ]
    run_here("wan_generate_video.py", *command, expect=expect)
    told = capsys.readouterr().err
    assert "generation needs " in told and " GiB for sampling, " in told
    assert bool(device.reads) == (tmp_path / "video.mp4").exists() == (expect == 0)
    (refused,) = [line for line in told.splitlines() if "not enough memory" in line] or [""]
    assert ("not enough memory on cuda:0: needs 0." in refused) == (expect == 2)
    if expect:
        assert "To reduce it: " in refused and "--blocks_to_swap," not in refused


def on_gpu(check: Callable[..., None], jobs: Any, settings: Any, loras: Any, _: torch.device, **more: Any) -> None:
    """Check as on a GPU, whatever device computes."""
    check(jobs, settings, loras, torch.device("cuda:0"), **more)
