"""Settings of the generator on the tiny model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from generate.settings import GenerateSettings
from tests.tiny.make import DIT, T5, VAE, make_models
from wan_train.cli import parse

Given = Callable[..., GenerateSettings]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny models."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.fixture
def given(models: Path) -> Given:
    """`given("--seed", 1)`: settings of a command line that names the tiny models and small, quick videos."""

    def build(*words: object) -> GenerateSettings:
        command = [
            *("--task", "t2v-1.3B", "--dit", models / DIT, "--vae", models / VAE, "--t5", models / T5),
            *("--video_size", 32, 32, "--video_length", 5, "--infer_steps", 2, "--device", "cpu"),
            *words,
        ]
        return parse(GenerateSettings, [str(word) for word in command])

    return build
