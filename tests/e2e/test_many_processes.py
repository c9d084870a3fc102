"""The generator on several processes, through its entry point: the same videos as on one, and one end for all."""

import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import wan_train
from generate.output import save_latents
from tests import processes
from tests.tiny.control import make_control_models
from tests.tiny.images import CLIP, I2V, make_image_models
from tests.tiny.make import DIT, SCENES, T5, VAE, dit_shapes, draw_frames, make_models, save
from tests.tiny.vae22 import VAE22, vae22_shapes
from wan_train.errors import InputError
from wan_train.media_out import write_image, write_video

SCRIPT = "wan_generate_video.py"
DIT5 = "wan_ti2v_tiny.safetensors"
SPLITS = [("--ulysses_size", 2), ("--ring_size", 2), ("--cfg_size", 2)]


def words(folder: Path, *more: object) -> list[object]:
    return [
        *("--task", "t2v-1.3B", "--dit", folder / DIT, "--vae", folder / VAE, "--t5", folder / T5, "--seed", 3),
        *("--video_size", 64, 48, "--video_length", 5, "--infer_steps", 3, *more),
    ]


def latents(path: Path) -> torch.Tensor:
    return load_file(path)["latent"]


def difference(ours: Path, right: Path) -> float:
    return float((latents(ours) - latents(right)).norm() / latents(right).norm())


def said(err: str) -> list[str]:
    """The lines that are no notes of what continues."""
    return [line for line in err.splitlines() if line.startswith(("error", "Traceback", "interrupted"))]


def test_two_processes_write_the_video_of_one_once(tiny: Path, tmp_path: Path) -> None:
    plain = words(tiny, "--prompt", "a red circle", "--output_type", "latent", "--cfg_skip_mode", "late")
    guided = ("--cfg_apply_ratio", 0.7, "--slg_layers", 1, "--slg_end", 0.7)  # passes one, two and three to a step
    processes.run(SCRIPT, *plain, *guided, "--save_path", tmp_path / "one.safetensors")
    for flag, size in SPLITS:
        done = processes.run(
            SCRIPT, *plain, *guided, flag, size, "--save_path", tmp_path / f"{flag}.safetensors", ranks=2
        )
        for told in ("INFO: wrote", "INFO: encoding", "WARNING: --dit"):
            assert done.stderr.count(told) == 1, done.stderr
        assert difference(tmp_path / f"{flag}_latent.safetensors", tmp_path / "one_latent.safetensors") < 1e-5, flag
    assert len(list(tmp_path.iterdir())) == 1 + len(SPLITS)


@pytest.mark.parametrize(
    ("split", "given"),
    [
        (
            ("--ulysses_size", 2, "--dit_fsdp"),
            (
                *("--step_cache", "teacache", "--tea_cache_l1_thresh", 5, "--slg_layers", 1, "--slg_end", 0.7),
                *("--video_size", 32, 32, "--video_length", 89, "--riflex", "--riflex_freq_index", 4),
            ),
        ),
        (
            ("--cfg_size", 2),
            (
                *("--step_cache", "attention", "--start_step", 0, "--attentioncache_interval", 2, "--end_step", 4),
                *("--video_length", 9, "--sliding_window_size", 2),
            ),
        ),
        (
            ("--cfg_size", 2),
            (
                *("--step_cache", "auto", "--error_budget", 10, "--slg_layers", 1, "--slg_end", 0.7),
                *("--video_length", 9, "--sliding_window_size", 2, "--cache_profile", "profile.json"),
            ),
        ),
    ],
)
def test_two_processes_reuse_the_same_passes(
    tiny: Path, tmp_path: Path, split: tuple[object, ...], given: tuple[object, ...]
) -> None:
    given = tuple(tmp_path / word if word == "profile.json" else word for word in given)
    plain = words(tiny, "--prompt", "a red circle", "--output_type", "latent", *given, "--infer_steps", 5)
    if "auto" in given:
        processes.run(SCRIPT, *plain, "--calibrate_steps", 5)
    counts = []
    for name, ranks, more in (("one", 1, ()), ("two", 2, split)):
        done = processes.run(SCRIPT, *plain, *more, "--save_path", tmp_path / f"{name}.safetensors", ranks=ranks)
        counts.append(re.findall(r"step cache \w+: (\d+) passes computed, (\d+) reused", done.stderr))
        assert ("INFO: RIFLEx: period" in done.stderr) == ("--riflex" in given)
    assert counts[0] == counts[1] and len(counts[0]) == 1 and int(counts[0][0][1]) > 0
    assert difference(tmp_path / "two_latent.safetensors", tmp_path / "one_latent.safetensors") < 1e-5


def test_groups_share_out_the_prompts_of_a_file(tiny: Path, tmp_path: Path) -> None:
    lines = [f"{caption} --d {index}" for index, caption in enumerate(SCENES)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    batch = words(tiny, "--from_file", tmp_path / "prompts.txt", "--output_type", "latent")
    for name, ranks, more in (("one", 1, ()), ("two", 2, ("--data_parallel", 2))):
        place = tmp_path / name / "{index}_{seed}.safetensors"
        processes.run(SCRIPT, *batch, *more, "--save_path", place, ranks=ranks)
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "two").iterdir()} and len(names) == len(lines)
    assert all(torch.equal(latents(tmp_path / "one" / name), latents(tmp_path / "two" / name)) for name in names)


def test_a_video_that_fails_leaves_those_of_all_groups(tiny: Path, tmp_path: Path) -> None:
    """Its folder cannot be made when it is due: a file has its name."""
    (tmp_path / "prompts.txt").write_text("a red circle --d 1\na blue square --d 2\na green triangle --d 3\n")
    (tmp_path / "2").write_text("in the way")
    batch = words(tiny, "--from_file", tmp_path / "prompts.txt", "--output_type", "latent", "--data_parallel", 2)
    started = processes.start(SCRIPT, *batch, "--save_path", tmp_path / "{seed}" / "v{index}.safetensors", ranks=2)
    _, err = started.communicate(60)
    assert [process.exitcode for process in started.processes] == [1, 1], err
    (line,) = said(err)
    assert line.startswith("error: 1 of 3 videos failed (video 1:"), line
    assert sorted(path.parent.name for path in tmp_path.glob("*/*_latent.safetensors")) == ["1", "3"]


def test_only_the_first_process_has_to_do_with_a_remote_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_latents(tmp_path / "a_latent.safetensors", torch.zeros(16, 1, 4, 4), "", {})
    given = words(tiny, "--latent_path", tmp_path / "a_latent.safetensors", "--cfg_size", 2)
    processes.run(SCRIPT, *given, "--save_path", f"file://{tmp_path}/there", ranks=2)
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["a.png"]
    assert not (processes.ROOT / "file:").exists(), "a local folder of the URL's name"


@pytest.mark.parametrize(
    ("ranks", "more", "reason"),
    [
        (2, (), "2 processes are running, but no option splits the work"),
        (2, ("--ulysses_size", 2, "--cfg_size", 2), "--ulysses_size 2 x --cfg_size 2 = 4, but 2 processes are running"),
        (1, ("--ulysses_size", 2), "--ulysses_size 2 = 2, but 1 process is running"),
        (3, ("--ulysses_size", 3), "has 2 attention heads: use one of 1, 2"),
        (2, ("--cfg_size", 2, "--cfg_merge"), "--cfg_merge runs both prompts in one pass, --cfg_size 2"),
        (2, ("--data_parallel", 2), "--data_parallel 2 is more than the number of videos, 1"),
        (2, ("--ulysses_size", 2, "--compile", "--compile_fullgraph"), "leave out --compile_fullgraph"),
        (2, ("--ulysses_size", 2, "--dit", "absent.safetensors"), "absent.safetensors"),
        (2, ("--cfg_size", 2, "--save_path", "a.webm"), ".webm is not supported"),  # what only the first looks at
        (2, ("--cfg_size", 2, "--save_path", "nope://x"), "--save_path nope://x cannot be opened"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tiny: Path, tmp_path: Path, ranks: int, more: tuple[object, ...], reason: str
) -> None:
    given = words(tiny, "--prompt", "a red circle", "--save_path", tmp_path, *more)
    started = processes.start(SCRIPT, *given, ranks=ranks)
    _, err = started.communicate(60)
    assert [process.exitcode for process in started.processes] == [2] * ranks, err
    assert len(said(err)) == 1 and reason in said(err)[0], err
    assert "INFO: loading" not in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [("--interactive",), ("--lora_weight", "a", "--save_merged_model", "b.safetensors")])
def test_what_only_one_process_does_is_refused(tiny: Path, tmp_path: Path, more: tuple[object, ...]) -> None:
    started = processes.start(SCRIPT, *words(tiny, "--cfg_size", 2, "--save_path", tmp_path, *more), ranks=2)
    _, err = started.communicate(60)
    assert [process.exitcode for process in started.processes] == [2, 2], err
    assert len(said(err)) == 1 and "with 2 processes" in said(err)[0], err


def test_the_python_call_is_of_one_process(tiny: Path) -> None:
    with pytest.raises(InputError, match="one process"):
        wan_train.generate("a red circle", task="t2v-1.3B", dit=str(tiny / DIT), ulysses_size=2)


def sampling_for_long(tiny: Path, tmp_path: Path, *more: object) -> processes.Started:
    """Two processes in the midst of their steps."""
    given = words(tiny, "--prompt", "a red circle", "--save_path", tmp_path, *more, "--infer_steps", 1000)
    started, deadline = processes.start(SCRIPT, *given, ranks=2), time.monotonic() + 60
    while " 1000 steps" not in started.said()[1] or "sampling:" not in started.said()[1]:
        assert time.monotonic() < deadline and started.poll() is None, started.said()
        time.sleep(0.1)
    return started


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_other(tiny: Path, tmp_path: Path, lost: int) -> None:
    started = sampling_for_long(tiny, tmp_path, "--ulysses_size", 2)
    os.kill(int(started.processes[lost].pid or 0), signal.SIGKILL)
    _, err = started.communicate(60)
    assert sorted(process.exitcode for process in started.processes) == [-signal.SIGKILL, 1]  # type: ignore[type-var]
    assert said(err)[0].startswith(f"error: process {lost} of this run has ended") and len(said(err)) == 1, err


def test_ctrl_c_ends_both(tiny: Path, tmp_path: Path) -> None:
    started = sampling_for_long(tiny, tmp_path, "--cfg_size", 2)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(60)
    assert [process.exitcode for process in started.processes] == [130, 130], err
    assert said(err) == ["interrupted"]


@pytest.mark.slow
def test_a_process_that_stands_still_ends_the_other(tiny: Path, tmp_path: Path) -> None:
    started = sampling_for_long(tiny, tmp_path, "--cfg_size", 2)
    os.kill(int(started.processes[1].pid or 0), signal.SIGSTOP)
    try:
        started.processes[0].join(60)
        assert started.processes[0].exitcode == 1
        assert said(started.said()[1])[0].startswith("error: process 1 of this run has ended")
    finally:
        started.kill()


# By task, its model and what it is given.
GIVEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "i2v-14B": (I2V, ("--image_path", "first.png")),
    "ti2v-5B": (DIT5, ("--image_path", "first.png")),
    "vace-1.3B": ("vace.safetensors", ("--vace_video", "control.mp4", "--vace_reference", "first.png")),
    "fun-control-1.3B": (
        "fun-control-v1.1.safetensors",
        ("--control_path", "control.mp4", "--reference_image", "first.png"),
    ),
}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models for images and controls, and what they are given."""
    folder = tmp_path_factory.mktemp("others")
    make_models(folder)
    make_image_models(folder)
    make_control_models(folder)
    save(folder / DIT5, dit_shapes(in_dim=48, channels=48), torch.bfloat16)
    save(folder / VAE22, vae22_shapes(), torch.float32)
    frames = np.stack([np.asarray(image) for image in draw_frames(next(iter(SCENES)), size=(96, 64), num_frames=9)])
    write_video(folder / "control.mp4", frames, fps=16)
    write_image(folder / "first.png", frames[0])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("task", GIVEN)
def test_other_models_make_what_one_process_makes(others: Path, tmp_path: Path, task: str) -> None:
    dit, given = GIVEN[task]
    inputs = [others / word if "." in word else word for word in given]
    common = words(others, "--task", task, "--dit", others / dit, "--clip", others / CLIP, *inputs)
    common += ["--prompt", "a red circle", "--output_type", "latent", "--video_length", 9, "--video_size", 96, 64]
    common += ["--vae", others / VAE22] if task == "ti2v-5B" else []
    processes.run(SCRIPT, *common, "--save_path", tmp_path / "one.safetensors")
    for index, sizes in enumerate(((2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2))):
        flags = zip(("--ulysses_size", "--ring_size", "--cfg_size"), sizes, strict=True)
        more = [word for pair in flags for word in pair]
        ranks = int(np.prod(sizes))
        processes.run(SCRIPT, *common, *more, "--save_path", tmp_path / f"{index}.safetensors", ranks=ranks)
        assert difference(tmp_path / f"{index}_latent.safetensors", tmp_path / "one_latent.safetensors") < 1e-5, sizes
