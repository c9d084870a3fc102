from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wan_train.cli import parse
from wan_train.training.objective.show_timesteps import NUM_BINS, show_timesteps
from wan_train.training.settings import TrainSettings


def settings(folder: Path, *words: str) -> TrainSettings:
    needed = ("--dit", "none", "--dataset_config", "none", "--output_name", "name", "--output_dir", str(folder))
    return parse(TrainSettings, [*needed, *words])


def shares(text: str) -> list[float]:
    """The percentages of a chart."""
    return [float(line.split("%")[0].split()[-1]) for line in text.splitlines()[1:]]


@pytest.mark.parametrize(
    ("words", "bins"),
    [
        ((), range(50)),
        (("--min_timestep", "200", "--max_timestep", "400"), range(10, 20)),
        (("--timestep_sampling", "shift", "--flow_shift", "3", "--min_timestep", "900"), range(45, 50)),
    ],
)
def test_the_chart_shows_what_is_drawn(tmp_path: Path, words: tuple[str, ...], bins: range) -> None:
    shown = shares(show_timesteps(settings(tmp_path, "--show_timesteps", "console", *words)))
    assert len(shown) == NUM_BINS
    assert sum(shown) == pytest.approx(100, abs=0.3)
    assert [place for place, share in enumerate(shown) if share] == list(bins)
    assert not any(tmp_path.iterdir())


def test_a_shift_moves_the_chart_and_the_longest_bar_is_the_most_frequent(tmp_path: Path) -> None:
    def lines(*words: str) -> list[str]:
        text = show_timesteps(settings(tmp_path, "--show_timesteps", "console", "--timestep_sampling", "shift", *words))
        return text.splitlines()[1:]

    def longest(lines: list[str]) -> int:
        return max(range(NUM_BINS), key=lambda place: lines[place].count("#"))

    assert abs(longest(lines()) - 25) < 6
    assert longest(lines("--discrete_flow_shift", "5")) > 38


def test_the_chart_tells_what_a_loss_counts(tmp_path: Path) -> None:
    text = show_timesteps(settings(tmp_path, "--show_timesteps", "console", "--weighting_scheme", "sigma_sqrt"))
    assert text.splitlines()[-1].endswith("x 1.02")
    assert "x" not in show_timesteps(settings(tmp_path, "--show_timesteps", "console")).split("pixels")[1]


def test_the_same_seed_shows_the_same(tmp_path: Path) -> None:
    def shown(seed: str) -> str:
        return show_timesteps(settings(tmp_path, "--show_timesteps", "console", "--seed", seed))

    assert shown("3") == shown("3") != shown("4")


def test_the_image_has_bars_where_levels_are(tmp_path: Path) -> None:
    words: Any = ("--show_timesteps", "image", "--min_timestep", "500")
    path = tmp_path / "out" / "timesteps.png"
    assert show_timesteps(settings(tmp_path / "out", *words)) == f"wrote {path}"
    blue = (np.asarray(Image.open(path)) == (70, 130, 180)).all(-1).any(0).nonzero()[0]
    middle = Image.open(path).width / 2
    assert blue.min() == middle
    assert blue.max() > 1.9 * middle
