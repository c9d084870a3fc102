"""The generator where diffusers is not installed: with a solver of our own, and with one of diffusers."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import pytest

from tests.processes import QUIET
from tests.tiny.make import DIT, T5, VAE

WITHOUT = """
import runpy, sys
sys.modules["diffusers"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def words(tiny: Path, video: Path) -> list[str]:
    given = [
        *("--task", "t2v-1.3B", "--dit", tiny / DIT, "--vae", tiny / VAE, "--t5", tiny / T5, "--save_path", video),
        *("--video_size", 64, 48, "--video_length", 5, "--infer_steps", 2, "--prompt", "a red circle"),
    ]
    return [str(word) for word in given]


def test_vanilla_generates_a_video(tiny: Path, tmp_path: Path, root: Path) -> None:
    video = tmp_path / "video.mp4"
    command = [sys.executable, "-c", WITHOUT, "wan_generate_video.py", *words(tiny, video)]
    done = subprocess.run(
        [*command, "--sample_solver", "vanilla"],
        cwd=root,
        env=os.environ | QUIET,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    with av.open(str(video)) as container:
        assert len(list(container.decode(video=0))) == 5


def test_a_solver_of_diffusers_is_refused_before_a_model_is_loaded(
    tiny: Path,
    tmp_path: Path,
    run_here: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr("wan_train.storage.read_tensors", loaded)
    monkeypatch.setattr("generate.main.run_jobs", loaded)
    run_here("wan_generate_video.py", *words(tiny, tmp_path / "video.mp4"), "--sample_solver", "unipc", expect=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "diffusers" in line]
    assert line.endswith(
        "--sample_solver unipc needs the package diffusers: pip install diffusers (listed in requirements-base.txt), or"
        " use --sample_solver vanilla, which needs no package"
    )
    assert not list(tmp_path.iterdir())
