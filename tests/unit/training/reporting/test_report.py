import base64
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wan_train.media_out import write_image, write_video
from wan_train.training.reporting.charts import MOST_POINTS, Series, draw_chart, nice_ticks, number, smoothed
from wan_train.training.reporting.report import find_previews, make_page, start, thin_out

EMPTY = {"meta", "img", "br"}


class Page(HTMLParser):
    """A page's tags; every one that is opened must be closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def row(step: int, **more: Any) -> dict[str, Any]:
    values = {"loss": 1 / step, "lr": 1e-4, "grad_norm": 2.0, "seconds": 0.5, "memory_mib": 2048}
    return {"step": step, "epoch": 1, "strata": {f"t{step % 8}": 1 / step}} | values | more


def held_out(step: int, loss: float) -> dict[str, Any]:
    change = {"step": 0, "mean": loss - 0.5, "low": loss - 0.6, "high": loss - 0.4}
    return {"step": step, "validation": {"loss": loss, "strata": [loss, None], "to_first": change if step else None}}


def make_run(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{name}.metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [held_out(0, 0.5), *(row(step) for step in range(1, 41)), held_out(40, 0.25)]
    rows[3]["loss"] = None  # a step that was left out
    make_run(tmp_path, "cat", rows)
    (tmp_path / "cat.config.toml").write_text('[save]\noutput_name = "<cat>"\n')
    save_file({"a": torch.zeros(1)}, tmp_path / "cat.safetensors", metadata={"ss_seed": "42"})
    frames = np.zeros((5, 32, 48, 3), np.uint8)
    for moment in ("e000000", "000020", "000040"):
        write_video(tmp_path / "sample" / f"cat_{moment}_00_20260101000000_7.mp4", frames, fps=16)
        write_image(tmp_path / "sample" / f"cat_{moment}_01_20260101000000_8.png", frames[0])
        for file in (tmp_path / "sample").glob(f"cat_{moment}_*"):
            at = 1e9 + int(moment.strip("e"))
            os.utime(file, (at, at))
    return tmp_path


def test_one_page_holds_all_and_reaches_for_nothing(folder: Path) -> None:
    assert start([str(folder)]) == 0
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert not re.search(r"https?:|//\w", re.sub(r"base64,[\w+/=]+", "", text))
    assert {tag for tag, _ in page.found} & {"script", "link", "iframe", "object"} == set()
    sources = [str(one["src"]) for one in (*page.all("video"), *page.all("img"))]
    mp4 = (folder / "sample" / "cat_e000000_00_20260101000000_7.mp4").read_bytes()
    assert len(sources) == 6 and all(source.startswith("data:") for source in sources)
    assert f"data:video/mp4;base64,{base64.b64encode(mp4).decode()}" in sources
    titles = [str(one["aria-label"]) for one in page.all("svg") if one.get("aria-label")]
    assert [title.split(",")[0] for title in titles] == [
        "Loss",
        "Validation loss",
        "Loss by noise level",
        "Validation loss by noise level",
        "Learning rate",
        "Gradient norm",
        "Seconds per step",
        "Peak memory",
    ]
    for words in ("output_name = &quot;&lt;cat&gt;&quot;", "ss_seed", "<td>42</td>", "0.25 at step 40", "2.00 GiB"):
        assert words in text
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text


def test_several_runs_are_compared(folder: Path) -> None:
    make_run(folder, "dog", [row(step) for step in range(1, 11)])
    assert start([str(folder), "--save_path", str(folder / "all.html")]) == 0
    text = (folder / "all.html").read_text()
    Page(text)
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["All runs", "cat", "dog"]
    assert start([str(folder), "--output_name", "dog"]) == 0
    assert re.findall(r"<h2>(.*?)</h2>", (folder / "report.html").read_text()) == ["dog"]


def test_a_run_without_a_step_makes_a_page_too(tmp_path: Path) -> None:
    for rows in ([], [row(1, loss=None, grad_norm=None)]):
        make_run(tmp_path, "name", rows)
        text = make_page(tmp_path, ["name"], max_bytes=0)
        assert Page(text).all("html") and "name" in text


def test_previews_beyond_the_limit_are_left_out_evenly(folder: Path) -> None:
    found = find_previews(folder, "cat")
    assert [(one.moment, one.index) for one in found] == [
        *(("e000000", 0), ("e000000", 1), ("000020", 0), ("000020", 1), ("000040", 0), ("000040", 1))
    ]
    size = sum(one.path.stat().st_size for one in found)
    assert thin_out(found, size) == found
    assert {one.moment for one in thin_out(found, size - 1)} == {"e000000", "000040"}
    assert thin_out(found, 10) == []
    assert "6 of 6 are left out" in make_page(folder, ["cat"], max_bytes=10)


def test_only_the_runs_own_previews(folder: Path) -> None:
    write_image(folder / "sample" / "cat_two_000020_00_20260101000000_7.png", np.zeros((8, 8, 3), np.uint8))
    assert len(find_previews(folder, "cat")) == 6
    assert len(find_previews(folder, "cat_two")) == 1


def test_as_a_command(folder: Path, root: Path) -> None:
    earlier, command = ([sys.executable, "-m", f"wan_train.training.{name}"] for name in ("report", "reporting.report"))
    done = subprocess.run([*earlier, str(folder)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "report.html" in done.stderr, done.stderr
    (folder / "empty").mkdir()
    done = subprocess.run([*command, str(folder / "empty")], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "has no NAME.metrics.jsonl" in done.stderr


def test_smoothing_is_a_mean_of_what_is_known() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0, np.nan])
    assert smoothed(values, 3).tolist() == [1.0, 2.0, 4.0, 4.0, 5.0]
    assert smoothed(values, 1)[[0, 2, 3]].tolist() == [1.0, 3.0, 5.0]
    assert np.isnan(smoothed(values, 1)[1])


def test_a_spike_survives_thinning_and_a_curve_has_few_points() -> None:
    steps, values = np.arange(100_000.0), np.zeros(100_000)
    values[54_321] = 7.0
    figure = draw_chart("x", [Series("y", steps, values)])
    path = max(re.findall(r' d="([^"]*)"', figure), key=len)
    points = [tuple(map(float, point.split())) for point in re.split("[ML]", path)[1:]]
    assert len(points) <= MOST_POINTS
    highest = min(points, key=lambda point: point[1])
    assert highest[0] == pytest.approx(92 + (720 - 92 - 40) * (54_321 / 100_000 * 0.97 + 0.015), abs=1.0)


def test_gaps_and_charts_of_nothing() -> None:
    nothing = Series("y", np.arange(3.0), np.full(3, np.nan))
    assert draw_chart("x", [nothing]) == ""
    gap = Series("y", np.arange(4.0), np.array([1.0, np.nan, 2.0, 3.0]))
    assert draw_chart("x", [gap, nothing]).count("M") >= 2
    assert "<b>3</b>" in draw_chart("x", [gap])
    assert draw_chart("<x>", [Series("<y>", np.arange(2.0), np.ones(2))]).count("&lt;") == 3


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(-3, 47) == pytest.approx([0, 10, 20, 30, 40])
    for low, high in ((1e-7, 3e-7), (5, 5000), (-2, -1)):
        ticks = nice_ticks(low, high)
        assert 3 <= len(ticks) <= 7 and low - 1e-12 <= ticks[0] and ticks[-1] <= high * (1 + 1e-9 * np.sign(high))


def test_numbers_are_short() -> None:
    assert [number(v) for v in (0, 0.12345, 1234.5, 2e-6, 123456789)] == ["0", "0.1235", "1234", "2e-6", "1.23e8"]
