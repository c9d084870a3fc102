import random
import weakref

import pytest
import torch

import wan_train
from cache_tools import cache_text_encoder_outputs
from cache_tools.settings import TEXT_TOOL
from dataset.caching.cache import read_text, text_path
from dataset.config import read_config
from dataset.items import Item
from dataset.sources import list_items
from tests.unit.dataset.drawing import draw_image, write_toml
from tests.unit.dataset.lookup import has_text
from wan_train.cli import run
from wan_train.errors import InputError
from wan_train.storage import read_header

TOML = """
[[datasets]]
image_directory = "one"
cache_directory = "cache/one"
[[datasets]]
image_directory = "two"
"""
CAPTIONS = {"one/a": "a cat", "one/b": "a dog, running", "two/a": "a cat", "two/c": "grass"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, caption in CAPTIONS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        draw_image(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    write_toml(tmp_path / "data.toml", TOML)
    (tmp_path / "t5.pth").write_text("stands for the text encoder")
    return tmp_path


def embed(caption):
    """As many rows as letters, each the letter's number."""
    return torch.tensor([[float(ord(letter))] * 4 for letter in caption or "."])


class SpyEncoder:
    """Stands in for the text encoder: notes the batches that it is given."""

    tokenizer = None

    def __init__(self):
        self.calls, self.loads, self.checked = [], [], []

    def __call__(self, captions):
        assert isinstance(captions, list)
        self.calls.append(captions)
        return [embed(caption) for caption in captions]

    def load(self, source, **options):
        self.loads.append((source, options))
        return self


@pytest.fixture
def spy(monkeypatch):
    spy = SpyEncoder()
    monkeypatch.setattr(wan_train, "load_text_encoder", spy.load, raising=False)
    monkeypatch.setattr(cache_text_encoder_outputs, "check_text_encoder", lambda *given: spy.checked.append(given))
    return spy


def cache(*more):
    return run(TEXT_TOOL, ["--dataset_config", "data.toml", "--t5", "t5.pth", "--device", "cpu", *more])


def all_items():
    return [item for config in read_config("data.toml") for item in list_items(config, allow_missing_captions=True)]


def test_every_item_has_its_own_unpadded_file(folder, spy, capsys):
    assert cache() == 0
    assert "4 encoded, 0 kept" in capsys.readouterr().err
    items = all_items()
    assert [text_path(item).relative_to(".").as_posix() for item in items] == [
        "cache/one/a_wan_te.safetensors",
        "cache/one/b_wan_te.safetensors",
        "two/a_wan_te.safetensors",
        "two/c_wan_te.safetensors",
    ]
    for item in items:
        assert torch.equal(read_text(item), embed(item.caption).bfloat16())
        assert list(read_header(text_path(item)).shapes) == ["varlen_t5_bfloat16"]


def test_a_caption_shared_by_items_is_encoded_once(folder, spy):
    cache("--batch_size", "2")
    assert spy.calls == [["a cat", "grass"], ["a dog, running"]]


def test_what_is_there_is_kept_and_no_model_loaded(folder, spy, capsys):
    cache()
    assert cache("--skip_existing") == 0
    assert "0 encoded, 4 kept" in capsys.readouterr().err
    assert len(spy.loads) == 1


def test_a_changed_caption_is_encoded_again_and_alone(folder, spy, capsys):
    cache()
    (folder / "one/b.txt").write_text("a fox")
    assert cache() == 0
    assert "1 encoded, 3 kept" in capsys.readouterr().err
    assert spy.calls[1:] == [["a fox"]]
    assert all(map(has_text, all_items()))
    assert torch.equal(read_text(all_items()[1]), embed("a fox").bfloat16())


def test_options_reach_the_encoder(folder, spy):
    cache("--tokenizer", "umt5")
    assert spy.loads == [("t5.pth", {"tokenizer": "umt5", "device": torch.device("cpu"), "dtype": None, "fp8": False})]
    assert spy.checked == [("t5.pth", "umt5")]


def test_fp8_reaches_the_encoder_and_makes_nothing_stale(folder, spy, capsys):
    cache("--fp8_t5")
    assert spy.loads[0][1]["fp8"] is True
    for more in ((), ("--fp8_t5",)):
        assert cache(*more) == 0
        assert "0 encoded, 4 kept" in capsys.readouterr().err.splitlines()[-1]
    assert len(spy.loads) == 1


def test_the_tokenizer_is_found_by_itself_otherwise(folder, spy):
    cache()
    assert spy.loads[0][1]["tokenizer"] == "auto"


def test_missing_captions_stop_the_run_unless_allowed(folder, spy, capsys):
    (folder / "two/c.txt").unlink()
    assert cache() == 2
    assert "c.png" in capsys.readouterr().err and not spy.loads
    assert cache("--allow_missing_captions") == 0
    assert spy.calls[0][0] == ""
    assert read_header(text_path(all_items()[-1])).metadata["caption1"] == ""


def test_a_missing_t5_names_the_option(folder, spy, capsys):
    assert run(TEXT_TOOL, ["--dataset_config", "data.toml"]) == 2
    assert capsys.readouterr().err.startswith("error: --t5")


def test_a_bad_t5_stops_before_anything_is_loaded(folder, spy, capsys, monkeypatch):
    def refuse(*given):
        raise InputError("t5.pth is a Wan DiT")

    monkeypatch.setattr(cache_text_encoder_outputs, "check_text_encoder", refuse)
    assert cache() == 2
    assert not spy.loads


def test_variants_and_the_empty_text_are_encoded_once_each_and_short_ones_together(folder, spy, capsys):
    write_toml(folder / "data.toml", '[general]\ncaption_variants = "lines"\ncaption_dropout_rate = 0.1\n' + TOML)
    (folder / "one/b.txt").write_text("a cat\na very long caption of a dog\n\ngrass\n")
    assert cache("--batch_size", "2") == 0
    assert "4 encoded, 0 kept" in capsys.readouterr().err
    assert spy.calls == [["", "a cat"], ["grass", "a very long caption of a dog"]]
    item = all_items()[1]
    assert item.captions == ("a cat", "a very long caption of a dog", "grass")
    for variant, text in ((None, ""), *enumerate(item.captions)):
        assert torch.equal(read_text(item, variant), embed(text).bfloat16())


def test_one_changed_variant_encodes_the_texts_of_its_item_alone(folder, spy, capsys):
    write_toml(folder / "data.toml", f'[general]\ncaption_variants = "lines"\n{TOML}')
    (folder / "one/b.txt").write_text("one\ntwo")
    cache()
    (folder / "one/b.txt").write_text("one\nthree")
    spy.calls.clear()
    assert cache() == 0
    assert "1 encoded, 3 kept" in capsys.readouterr().err
    assert spy.calls == [["one", "three"]]


def test_embeddings_are_let_go_with_the_last_item_that_needs_them(folder):
    """Of many items with captions of their own, no more embeddings are alive than those of one batch and the shared."""
    alive = weakref.WeakSet()

    def encode(texts):
        found = [embed(text) for text in texts]
        alive.update(found)
        return found

    for number in range(40):
        draw_image(folder / f"one/{number:02d}.png")
        (folder / f"one/{number:02d}.txt").write_text(f"caption {number:02d}")
    write_toml(folder / "data.toml", f"[general]\ncaption_dropout_rate = 0.1\n{TOML}")
    held = [len(alive) for _ in cache_text_encoder_outputs.encode_items(encode, all_items(), 4)]
    assert len(held) == 44
    assert max(held) <= 9


def test_texts_of_a_batch_are_of_about_one_length(folder):
    chance = random.Random(0)
    config = read_config("data.toml")[0]
    items = [
        Item(config, folder / f"{n}.png", tuple("x" * chance.randrange(1, 400) + str(n) for _ in range(1 + n % 3)))
        for n in range(300)
    ]
    batches = cache_text_encoder_outputs.batch_texts(items, 8)
    assert sorted(text for batch in batches for text in batch) == sorted({t for item in items for t in item.captions})
    assert max(map(len, batches)) == 8
    padding = sum(len(batch) * max(map(len, batch)) - sum(map(len, batch)) for batch in batches)
    assert padding < 0.1 * sum(len(text) for batch in batches for text in batch)


def test_another_text_encoder_makes_everything_again(folder, spy, capsys):
    cache()
    (folder / "t5.pth").write_text("another text encoder")
    assert cache() == 0
    error = capsys.readouterr().err
    assert "4 encoded, 0 kept, 4 stale" in error and "different text encoder (t5.pth)" in error
    assert cache() == 0
    assert "0 encoded, 4 kept" in capsys.readouterr().err


def test_prune_deletes_the_texts_of_files_that_are_gone(folder, spy, capsys):
    cache()
    latents = folder / "cache/one/b_0064x0048_wan.safetensors"
    latents.write_bytes(b"of the other command")
    for name in ("one/b.png", "one/b.txt"):
        (folder / name).unlink()
    assert cache() == 0
    assert "1 orphaned" in capsys.readouterr().err and (folder / "cache/one/b_wan_te.safetensors").exists()
    assert cache("--prune") == 0
    assert "deleted 1 orphaned caches: b_wan_te.safetensors" in capsys.readouterr().err
    assert not (folder / "cache/one/b_wan_te.safetensors").exists() and latents.exists()


class LongCaptions:
    """Stands in for a tokenizer that cuts off captions of 10 letters."""

    def find_cut(self, texts):
        return {text for text in texts if len(text) > 10}


def test_files_whose_captions_are_cut_off_are_named_once(folder, spy, capsys):
    spy.tokenizer = LongCaptions()
    (folder / "two/c.txt").write_text("a much longer caption")
    assert cache("--batch_size", "1") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "truncated" in line]
    assert told == ["WARNING: 2 of 4 captions are longer than 512 tokens and will be truncated (b.png, c.png)"]
