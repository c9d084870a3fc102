"""Options in a TOML file."""

from pathlib import Path

import pytest

from wan_train.cli import parse
from wan_train.config_file import configuration_text
from wan_train.errors import InputError
from wan_train.training.settings import TrainSettings

FILE = """
dit = "model.safetensors"
[any]
dataset_config = "data.toml"
output_dir = "out"
output_name = "name"
learning_rate = 2e-4
sdpa = true
gradient_checkpointing = true
fp8_base = false
[any.deeper]
optimizer_args = ["weight_decay=0.01", "betas=(0.9, 0.99)"]
"""


def read(folder: Path, text: str, *words: str) -> TrainSettings:
    (folder / "c.toml").write_text(text)
    return parse(TrainSettings, ["--config_file", str(folder / "c.toml"), *words])


def test_the_file_sets_and_the_command_line_wins(tmp_path: Path) -> None:
    settings = read(tmp_path, FILE, "--learning_rate", "1e-3", "--output_name", "other")
    assert settings.dit.dit == "model.safetensors"
    assert settings.optimizer.learning_rate == 1e-3
    assert settings.save.output_name == "other"
    assert settings.optimizer.optimizer_args == ("weight_decay=0.01", "betas=(0.9, 0.99)")
    assert settings.activations.recompute == "full" and not settings.weights.fp8_base
    first = parse(TrainSettings, [f"--config_file={tmp_path / 'c.toml'}"])
    assert first.optimizer.learning_rate == 2e-4


def test_what_is_written_gives_the_same_settings(tmp_path: Path) -> None:
    settings = read(tmp_path, FILE, "--network_args", "a=b", "--save_every_n_epochs", "2", "--resume", "auto")
    again = read(tmp_path, configuration_text(settings, seed=9))
    assert again.loop.seed == 9
    assert (again.save.save_every_n_epochs, again.save.resume) == (2, None)
    for group in ("dit", "weights", "activations", "network", "optimizer", "timesteps", "data"):
        assert getattr(again, group) == getattr(settings, group)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat = 1.0", "unknown option learning_rat; did you mean learning_rate"),
        ("sdpa = 1", "sdpa must be true or false, not 1"),
        ("learning_rate = true", "learning_rate must be a value, not True"),
        ("[a]\nseed = 1\n[b]\nseed = 2", "seed is given twice"),
        ("= 3", "is not TOML"),
        ("config_file = 'x'", "unknown option config_file"),
        ("learning_rate = 'much'", "expected a number, got 'much'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, text)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"--config_file nowhere\.toml cannot be read"):
        parse(TrainSettings, ["--config_file", "nowhere.toml"])
