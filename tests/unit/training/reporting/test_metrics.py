import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wan_train.errors import InputError, RunError
from wan_train.media_out import write_image, write_video
from wan_train.training.reporting.metrics import MetricsWriter, StepMetrics, loss_by_stratum, num_tokens, read_rows
from wan_train.training.reporting.settings import LogSettings
from wan_train.training.reporting.trackers import check_trackers
from wan_train.training.saving.settings import SaveSettings

ROW = StepMetrics(1, 1, 0.5, 0.5, 1e-4, 2.0, 0.1, 100)
SILENT = LogSettings(log_with="none")


def save_to(folder: Path) -> SaveSettings:
    return SaveSettings(output_dir=str(folder), output_name="name")


def write(folder: Path, steps: range, logs: LogSettings = SILENT, keep_until: int | None = None) -> None:
    writer = MetricsWriter(logs, save_to(folder), keep_until=keep_until)
    for step in steps:
        writer.write(replace(ROW, step=step, epoch=1 + step // 4, loss=step / 10))
    writer.close()


def rows(folder: Path) -> list[dict[str, float]]:
    return read_rows(folder / "name.metrics.jsonl")


def test_a_row_holds_what_is_known_and_the_epochs_mean(tmp_path: Path) -> None:
    writer = MetricsWriter(SILENT, save_to(tmp_path))
    writer.write(replace(ROW, strata={"t3": 0.25}, adapter_norm=1.5, learning_rates={"lora_up": 1e-3}))
    writer.write(replace(ROW, step=2, loss=0.7))
    writer.write(replace(ROW, step=3, epoch=2, loss=0.9))
    writer.close()
    first, second, third = rows(tmp_path)
    assert (first["strata"], first["adapter_norm"], first["learning_rates"]) == ({"t3": 0.25}, 1.5, {"lora_up": 1e-3})
    assert "tokens_per_second" not in first
    assert [row["loss_epoch"] for row in (first, second, third)] == [0.5, pytest.approx(0.6), 0.9]


def test_a_resumed_run_keeps_the_rows_before_it_and_no_others(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    whole = rows(tmp_path)
    path = tmp_path / "name.metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 8, "lo')
    write(tmp_path, range(6, 8), keep_until=5)
    assert rows(tmp_path) == whole
    write(tmp_path, range(1, 2))
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_what_is_no_number_is_null_and_ruins_no_mean(tmp_path: Path) -> None:
    writer = MetricsWriter(SILENT, save_to(tmp_path))
    writer.write(replace(ROW, loss=math.nan, grad_norm=math.inf))
    writer.write(replace(ROW, step=2, loss=0.25))
    writer.write_row({"step": 2, "validation": {"mean": 0.5, "interval": [0.4, math.nan]}})
    writer.close()
    first, second, third = (
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "name.metrics.jsonl").read_text().splitlines()
    )
    assert (first["loss"], first["grad_norm"], second["loss_epoch"]) == (None, None, 0.25)
    assert third["validation"]["interval"] == [0.4, None]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no device that is always full")
    (tmp_path / "name.metrics.jsonl").symlink_to("/dev/full")
    writer = MetricsWriter(SILENT, save_to(tmp_path))
    with pytest.raises(RunError, match=r"cannot write .*name\.metrics\.jsonl: No space left"):
        writer.write(ROW)


def board(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def test_tensorboard_has_curves_and_previews(tmp_path: Path) -> None:
    logs = LogSettings(log_prefix="try-", logging_dir=str(tmp_path / "boards"))
    writer = MetricsWriter(logs, save_to(tmp_path))
    writer.write(replace(ROW, strata={"t0": 0.2, "t7": 0.9}, learning_rates={"up": 1e-3}, tokens_per_second=10.0))
    best = {"step": 0, "mean": -0.1}
    writer.write_row(
        {"step": 1, "validation": {"loss": 0.4, "strata": [0.1, None], "verdict": "first", "to_best": best}}
    )
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, fps=16)
    write_image(tmp_path / "b.png", frames[0])
    writer.write_previews({0: tmp_path / "a.mp4", 1: tmp_path / "b.png"}, 1, fps=16)
    writer.close()
    found = board(tmp_path / "boards" / "try-name")
    wanted = {
        *(
            "loss/current",
            "loss/average",
            "loss/epoch",
            "loss_by_t/t0",
            "loss_by_t/t7",
            "lr",
            "lr/up",
            "validation/loss",
            "validation/strata/0",
            "validation/to_best/mean",
        ),
        *("norm/gradient", "speed/seconds_per_step", "speed/tokens_per_second", "memory/peak_mib"),
    }
    assert set(found.Tags()["scalars"]) == wanted
    assert found.Scalars("loss_by_t/t7")[0].value == pytest.approx(0.9)
    video, image = (found.Images(f"preview/{index:02d}")[0].encoded_image_string for index in range(2))
    assert (video[:4], image[1:4]) == (b"GIF8", b"PNG")


def test_settings_are_shown_if_asked_for(tmp_path: Path) -> None:
    for asked in (False, True):
        logs = LogSettings(log_config=asked, logging_dir=str(tmp_path / str(asked)))
        MetricsWriter(logs, save_to(tmp_path), config={"ss_seed": "77"}).close()
        found = board(tmp_path / str(asked) / "name").Tags()["tensors"]
        assert found == (["settings/text_summary"] if asked else [])


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8), LogSettings())
    write(tmp_path, range(6, 8), LogSettings(), keep_until=5)
    events = board(tmp_path / "logs" / "name").Scalars("loss/current")
    assert [event.step for event in events] == list(range(1, 8))


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = MetricsWriter(LogSettings(), save_to(tmp_path))
    writer.write_previews({0: tmp_path / "absent.png"}, 1, fps=16)
    writer.write(ROW)
    writer.close()
    assert "TensorBoard failed and is disabled" in capsys.readouterr().err
    assert len(rows(tmp_path)) == 1


def test_tracker_config_reaches_the_tracker_and_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "trackers.toml"
    path.write_text('[tensorboard]\nfilename_suffix = ".mine"\n')
    logs = LogSettings(log_tracker_config=str(path))
    write(tmp_path, range(1, 2), logs)
    assert [p.name.endswith(".mine") for p in (tmp_path / "logs" / "name").iterdir()] == [True]
    for text, told in (("[comet]\n", "has comet"), ("[wandb\n", "cannot read"), ("wandb = 3\n", "has wandb")):
        path.write_text(text)
        with pytest.raises(InputError, match=told):
            check_trackers(logs)
    path.write_text("[tensorboard]\nno_such = 1\n")
    with pytest.raises(InputError, match="cannot start TensorBoard"):
        write(tmp_path, range(1, 2), logs)


def test_wandb_offline_keeps_curves_and_videos_but_no_key(tmp_path: Path, root: Path) -> None:
    """With the real package, in a process of its own: it starts servers and threads."""
    frames = np.zeros((5, 32, 48, 3), np.uint8)
    write_video(tmp_path / "a.mp4", frames, fps=16)
    script = f"""
import sys
from pathlib import Path
from wan_train.training.reporting.metrics import MetricsWriter, StepMetrics
from wan_train.training.saving.settings import SaveSettings
from wan_train.training.reporting.settings import LogSettings
folder = Path({str(tmp_path)!r})
named = dict(wandb_run_name="mine", log_tracker_name="projekt", wandb_api_key=sys.argv[2])
logs = LogSettings(log_with="all", log_config=True, **named)
save = SaveSettings(output_dir=str(folder), output_name="name")
for keep_until in (None, 1):
    writer = MetricsWriter(logs, save, keep_until=keep_until, config={{"ss_seed": "77"}})
    writer.write(StepMetrics(2 if keep_until else 1, 1, 0.123, 0.5, 1e-4, 2.0, 0.1, 100))
    writer.write_previews({{0: folder / "a.mp4"}}, 1, fps=16)
    writer.close()
"""
    key = "0123456789abcdef" * 2 + "deadbeef"
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", script, "--wandb_api_key", key]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    runs = sorted((tmp_path / "logs" / "wandb").glob("offline-run-*"))
    files = [path for path in (tmp_path / "logs" / "wandb").rglob("*") if path.is_file()]
    everything = b"".join(path.read_bytes() for path in files)
    assert all(word in everything for word in (b"projekt", b"mine", b"loss/current", b"ss_seed", b"video-file"))
    assert any(path.suffix == ".mp4" for path in files)
    assert key.encode() not in everything
    assert key not in done.stdout + done.stderr
    # One run, gone on with.
    identity = rows(tmp_path)[0]["wandb_id"]
    assert {path.name.rsplit("-", 1)[1] for path in runs} == {identity}
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [1, 2]


def test_wandb_without_key_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match="W&B needs a key"):
        check_trackers(LogSettings(log_with="wandb"))
    check_trackers(LogSettings(log_with="wandb", wandb_api_key="x"))


def test_losses_by_eighths_of_t() -> None:
    t = torch.tensor([0.0, 0.1249, 0.125, 0.5, 1.0])
    losses = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0])
    assert loss_by_stratum(t, losses) == {"t0": 2.0, "t1": 5.0, "t4": 7.0, "t7": 9.0}


def test_tokens_are_patches_of_two_by_two() -> None:
    assert num_tokens((2, 16, 21, 60, 104)) == 2 * 32760


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_not_that_of_whoever_started_the_process(root: Path) -> None:
    heavy = b"\1" * 2**30
    script = "import torch; from wan_train.training.reporting.metrics import peak_memory_mib as peak"
    script += "; print(peak(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert 50 < int(done.stdout) < len(heavy) // 2**20
