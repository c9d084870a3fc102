"""The demo, in its fast form, as a newcomer runs it: a new word is learnt and the old ones stay."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.nano import demo
from wan_train.training.metrics import read_rows


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
