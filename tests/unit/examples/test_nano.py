"""The small model that ships: its files, what it has learnt, and that every way of holding its weights keeps it."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from examples.nano.judge import judge
from examples.nano.measure import choose_held_out, generate_clips, open_models, shares, vae_psnr
from examples.nano.names import CONFIG, DIT, T5, TOKENIZER, VAE
from examples.nano.world import UNUSED_WORDS, all_scenes
from wan_train.models.encoders.tokenizer import read_tokenizer
from wan_train.models.vae.vae import load_vae

NANO = Path(__file__).resolve().parents[3] / "examples" / "nano"
SCENES = choose_held_out(8)
CAPTIONS = [scene.caption for scene in SCENES]


def test_the_files_are_small_bf16_and_named_as_the_published_ones() -> None:
    files = [path for path in NANO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 14_000_000
    for name in (DIT, VAE, T5):
        with safe_open(NANO / name, framework="pt") as file:
            assert {str(file.get_slice(key).get_dtype()) for key in file.keys()} == {"BF16"}  # noqa: SIM118
    about = json.loads((NANO / CONFIG).read_text())
    assert about["model_type"] == "t2v" and about["dim"] % about["num_heads"] == 0


def test_a_word_is_a_token_the_unused_ones_too() -> None:
    tokenizer = read_tokenizer(NANO / TOKENIZER / "tokenizer.json")
    words = {word for scene in all_scenes() for word in scene.caption.split()} | set(UNUSED_WORDS)
    ids = {word: tuple(tokenizer([word])[0]) for word in words}
    assert all(len(each) == 2 for each in ids.values())  # the word and the end
    assert len(set(ids.values())) == len(words)


def test_the_vae_draws_what_it_was_given() -> None:
    assert vae_psnr(load_vae(NANO / VAE), count=6) >= 26


def fits(*options: str) -> float:
    """The share of eight held-out captions whose clip shows one whole shape of the right colour."""
    clips = generate_clips(open_models(NANO, options), CAPTIONS, steps=8)
    return shares([judge(clip) for clip in clips], SCENES)["colour"]


@pytest.fixture(scope="module")
def plain() -> float:
    return fits()


def test_it_shows_what_captions_say_that_it_never_saw(plain: float) -> None:
    assert plain >= 7 / 8


@pytest.mark.parametrize(
    "options", [("--fp8", "--fp8_scaled"), ("--int8_base",), ("--blocks_to_swap", "3")], ids=["fp8", "int8", "streamed"]
)
def test_no_way_of_holding_its_weights_makes_it_forget(options: tuple[str, ...], plain: float) -> None:
    assert fits(*options) >= plain - 1 / 8


def test_another_seed_is_another_clip() -> None:
    models = open_models(NANO)
    first, second = (generate_clips(models, CAPTIONS[:1], steps=4, first_seed=seed)[0] for seed in (0, 1))
    assert not np.array_equal(first, second)
