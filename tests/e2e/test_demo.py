"""The demo, in its fast form, as a newcomer runs it: a new word is learnt and the old ones stay."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples.nano import demo
from examples.nano.measure import generate_clips, open_models
from wan_train.training.reporting.metrics import read_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """What the demo leaves; its words on the terminal are in said.txt."""
    made = tmp_path_factory.mktemp("demo") / "here"
    command = [sys.executable, "examples/nano/demo.py", str(made), "--fast"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (made / "said.txt").write_text(done.stdout, encoding="utf-8")
    return made


def test_the_new_word_comes_with_the_lora_alone_and_the_old_ones_stay(folder: Path) -> None:
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["new_before"] == 0 < outcome["new_after"]
    assert outcome["before"]["colour"] >= 0.9
    assert outcome["after"]["colour"] >= outcome["before"]["colour"] - 0.3


def test_the_held_out_loss_falls(folder: Path) -> None:
    rows = read_rows(folder / "out" / f"{demo.NEW}.metrics.jsonl")
    losses = [row["validation"]["loss"] for row in rows if "validation" in row]
    assert len(losses) >= 2 and min(losses[1:]) < losses[0]


def test_it_says_what_it_does_and_what_came_of_it(folder: Path) -> None:
    said = (folder / "said.txt").read_text(encoding="utf-8")
    titles = [title for title, _ in demo.commands("demo", "model", demo.FAST)]
    assert all(f"/{len(titles)}] {title}\n$ " in said for title in titles)
    assert re.search(r"'cyan' comes out right in \d of 5 videos with the LoRA, in 0 without", said)
    assert "report.html" in said


def test_the_page_stands_alone(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<video autoplay") >= 2 * (demo.FAST.new_videos + 8)
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert "wan_train_network.py" in page and "<svg" in page


def clip(*options: object) -> np.ndarray:
    """What the generator makes of a caption with the new word, in levels."""
    models = open_models(demo.MODEL, [str(option) for option in options])
    return generate_clips(models, [demo.new_scenes(demo.FAST)[0].caption], steps=6)[0].astype(float)


def test_merged_attached_converted_and_back_the_lora_makes_the_same_video(folder: Path, root: Path) -> None:
    names = ("out/cyan.safetensors", "cyan_comfy.safetensors", "back.safetensors")
    saved, comfy, back = (folder / name for name in names)
    command = [sys.executable, "convert_lora.py", "--input", comfy, "--output", back, "--target", "default"]
    subprocess.run(list(map(str, command)), cwd=root, check=True)
    attached, plain = clip("--lora_weight", saved, "--lora_mode", "attach"), clip()
    assert np.abs(attached - plain).mean() > 3
    for lora, mode in ((saved, "merge"), (comfy, "attach"), (back, "attach"), (back, "merge")):
        # Merging rounds to the weights' bf16.
        assert np.abs(clip("--lora_weight", lora, "--lora_mode", mode) - attached).mean() < 1.5


@pytest.mark.slow
def test_a_resumed_training_is_the_unbroken_one(folder: Path, root: Path) -> None:
    def train(name: str, *options: object) -> dict[str, torch.Tensor]:
        words = dict(demo.commands(str(folder), str(demo.MODEL), demo.FAST))["Train"]
        words = words[words.index("wan_train_network.py") :]
        words = words[: words.index("--validation_split")]  # no previews, no held-out clips
        words[words.index("--lr_scheduler") + 1] = "constant"
        given = ["--output_dir", folder / name, "--output_name", "x", "--max_train_steps", 6, *options]
        subprocess.run([sys.executable, *words, *map(str, given)], cwd=root, check=True)
        return load_file(folder / name / "x.safetensors")

    whole = train("whole")
    train("parts", "--save_every_n_steps", 3, "--save_state")
    (folder / "parts" / "x.safetensors").unlink()
    again = train("again", "--resume", folder / "parts" / "x-step00000003-state")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.slow
def test_the_claim_of_the_whole_demo_holds(tmp_path: Path, root: Path) -> None:
    """It ends with 1 unless the word comes out in 8 of 10 videos, in none without, and old captions lose 10 points."""
    done = subprocess.run([sys.executable, "examples/nano/demo.py", str(tmp_path)], cwd=root, capture_output=True)
    assert done.returncode == 0, done.stdout[-1000:]
