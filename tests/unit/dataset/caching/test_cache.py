from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dataset.caching.cache import (
    latents_path,
    read_latents,
    read_text,
    save_latents,
    save_text,
    text_path,
)
from dataset.config import DatasetConfig
from dataset.items import Clip, Item
from tests.unit.dataset.lookup import has_latents, has_text
from wan_train.errors import InputError
from wan_train.storage import read_header, save_tensors


def make_item(folder, *, is_video=True, name="press_a.mp4", caption="a press"):
    return Item(DatasetConfig(folder / "data.toml", 1, is_video, folder, folder / "cache"), folder / name, (caption,))


def make_clip(folder, **item):
    return Clip(make_item(folder, **item), 7, tuple(range(7, 32)), (832, 480), (1920, 1080))


def make_image(folder):
    return Clip(make_item(folder, is_video=False, name="still.one.png"), 0, (0,), (624, 640), (512, 500))


def random_latents(clip):
    return torch.randn(clip.latent_shape, generator=torch.Generator().manual_seed(0))


def test_file_names():
    clip, image = make_clip(Path("/x")), make_image(Path("/x"))
    assert str(latents_path(clip)) == "/x/cache/press_a_00007-025_0832x0480_wan.safetensors"
    assert str(latents_path(image)) == "/x/cache/still.one_0512x0500_wan.safetensors"
    assert str(text_path(clip.item)) == "/x/cache/press_a_wan_te.safetensors"


@pytest.mark.parametrize("is_video", [True, False])
@pytest.mark.parametrize("letter", ["x", "é"])
def test_names_that_no_file_system_takes_are_shortened_with_a_hash(tmp_path, is_video, letter):
    longest = 255 - 36 if is_video else 255 - 26
    size = len(letter.encode())
    fits = make_item(tmp_path, is_video=is_video, name=letter * (longest // size) + ".mp4")
    assert text_path(fits).name == f"{fits.path.stem}_wan_te.safetensors"
    stem = letter * (longest // size + 1)
    names = set()
    for ending in ("", "a", "b"):
        item = make_item(tmp_path, is_video=is_video, name=f"{stem}{ending}.mp4")
        clip = Clip(item, 7, tuple(range(7, 32)) if is_video else (0,), (832, 480), (1920, 1080))
        shared = text_path(item).name.removesuffix("_wan_te.safetensors")
        assert latents_path(clip).name.startswith(f"{shared}_") and shared.startswith(letter * 70)
        save_text(item, {item.caption: torch.zeros(1, 2)})
        save_latents(clip, torch.zeros(clip.latent_shape), torch.bfloat16)
        assert has_latents(clip) and has_text(item)
        names.add(shared)
    assert len(names) == 3


def test_what_a_video_file_holds(tmp_path):
    clip = make_clip(tmp_path)
    latents = random_latents(clip)
    save_latents(clip, latents, torch.bfloat16)
    header = read_header(latents_path(clip))
    assert header.shapes == {"latents_7x60x104_bfloat16": (16, 7, 60, 104)}
    assert header.dtypes == {"latents_7x60x104_bfloat16": torch.bfloat16}
    assert header.metadata == {
        "architecture": "wan",
        "width": "832",
        "height": "480",
        "format_version": "1.0.1",
        "frame_count": "25",
    }
    assert torch.equal(read_latents(clip), latents.bfloat16())


def test_what_an_image_file_holds(tmp_path):
    image = make_image(tmp_path)
    save_latents(image, random_latents(image), torch.float32)
    header = read_header(latents_path(image))
    assert header.shapes == {"latents_1x80x78_float32": (16, 1, 80, 78)}
    assert header.metadata == {"architecture": "wan", "width": "512", "height": "500", "format_version": "1.0.1"}


def test_what_a_text_file_holds(tmp_path):
    item = make_item(tmp_path)
    embedding = torch.randn(9, 32)
    save_text(item, {item.caption: embedding})
    header = read_header(text_path(item))
    assert header.shapes == {"varlen_t5_bfloat16": (9, 32)}
    assert header.metadata == {"architecture": "wan", "caption1": "a press", "format_version": "1.0.1"}
    assert torch.equal(read_text(item), embedding.bfloat16())


def with_captions(folder, *captions, rate=0.0):
    item = make_item(folder)
    return replace(item, captions=captions, config=replace(item.config, caption_dropout_rate=rate))


def test_a_file_holds_every_variant_and_the_empty_text(tmp_path):
    item = with_captions(tmp_path, "one", "two", "one", rate=0.1)
    found = {text: torch.randn(length, 8) for length, text in ((1, ""), (4, "one"), (5, "two"), (6, "of another item"))}
    save_text(item, found)
    header = read_header(text_path(item))
    assert header.shapes == {
        "varlen_t5_bfloat16": (4, 8),
        "varlen_t5_v2_bfloat16": (5, 8),
        "varlen_t5_v3_bfloat16": (4, 8),
        "varlen_t5_empty_bfloat16": (1, 8),
    }
    captions = {f"caption{number}": caption for number, caption in enumerate(item.captions, 1)}
    assert header.metadata == {"architecture": "wan", "format_version": "1.0.1", **captions}
    for variant, text in ((None, ""), (0, "one"), (1, "two"), (2, "one")):
        assert torch.equal(read_text(item, variant), found[text].bfloat16())


def test_text_counts_only_with_every_variant_and_the_empty_text_if_needed(tmp_path):
    found = {text: torch.randn(3, 8) for text in ("", "one", "two", "three")}
    save_text(with_captions(tmp_path, "one", "two"), found)
    assert has_text(with_captions(tmp_path, "one", "two"))
    assert has_text(with_captions(tmp_path, "one"))
    assert not has_text(with_captions(tmp_path, "one", "three"))
    assert not has_text(with_captions(tmp_path, "two", "one"))
    assert not has_text(with_captions(tmp_path, "one", "two", "three"))
    assert not has_text(with_captions(tmp_path, "one", "two", rate=0.5))
    save_text(with_captions(tmp_path, "one", "two", rate=0.5), found)
    assert has_text(with_captions(tmp_path, "one", "two", rate=0.5))


def test_latents_count_only_for_this_clip(tmp_path):
    clip, image = make_clip(tmp_path), make_image(tmp_path)
    assert not has_latents(clip)
    save_latents(clip, random_latents(clip), torch.bfloat16)
    assert has_latents(clip) and has_latents(clip, torch.bfloat16)
    assert not has_latents(clip, torch.float32)
    # An image's file keeps its name when the bucket changes: only what is inside tells.
    save_latents(image, random_latents(image), torch.bfloat16)
    other = Clip(image.item, 0, (0,), (320, 336), image.source_size)
    assert latents_path(other) == latents_path(image)
    assert has_latents(image) and not has_latents(other)


@pytest.mark.parametrize("length", [0, 5, 1000])
def test_half_a_file_does_not_count(tmp_path, length):
    clip = make_clip(tmp_path)
    save_latents(clip, random_latents(clip), torch.bfloat16)
    save_text(clip.item, {clip.item.caption: torch.randn(40, 32)})
    for path in (latents_path(clip), text_path(clip.item)):
        path.write_bytes(path.read_bytes()[:length])
    assert not has_latents(clip)
    assert not has_text(clip.item)


def test_text_counts_only_for_this_caption(tmp_path):
    save_text(make_item(tmp_path), {"a press": torch.randn(9, 32)})
    assert has_text(make_item(tmp_path))
    assert not has_text(make_item(tmp_path, caption="another press"))
    assert not has_text(make_item(tmp_path, name="press_b.mp4"))


def test_files_of_musubi_tuner_are_read(tmp_path):
    clip = make_clip(tmp_path)
    latents, text = random_latents(clip), torch.randn(9, 32)
    tensors = {
        "clip_float16": torch.zeros(257, 1280, dtype=torch.float16),
        "latents_control_7x60x104_float16": torch.zeros(16, 7, 60, 104, dtype=torch.float16),
        "latents_image_7x60x104_float16": torch.zeros(20, 7, 60, 104, dtype=torch.float16),
        "latents_7x60x104_float16": latents.half(),
    }
    save_tensors(latents_path(clip), tensors, {"architecture": "wan", "width": "832", "height": "480"})
    save_tensors(text_path(clip.item), {"varlen_t5_float32": text}, {"architecture": "wan", "caption1": "a press"})
    assert has_latents(clip) and has_text(clip.item)
    assert torch.equal(read_latents(clip), latents.half())
    assert torch.equal(read_text(clip.item), text)


def test_numbers_that_are_not_finite_are_refused_with_the_clip(tmp_path):
    clip = make_clip(tmp_path)
    latents = random_latents(clip)
    latents[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"press_a\.mp4, from frame 7"):
        save_latents(clip, latents, torch.bfloat16)
    with pytest.raises(InputError, match="NaN or Inf in float16"):
        save_latents(clip, random_latents(clip) * 1e6, torch.float16)
    with pytest.raises(InputError, match=r"press_a\.mp4"):
        save_text(clip.item, {"a press": torch.full((2, 4), float("inf"))})
    assert not (tmp_path / "cache").exists()


def test_a_file_that_vanishes_is_an_error_with_its_name(tmp_path):
    clip = make_clip(tmp_path)
    with pytest.raises(InputError, match="press_a_00007"):
        read_latents(clip)
    save_tensors(latents_path(clip), {"other": torch.zeros(1)})
    with pytest.raises(InputError, match="press_a_00007"):
        read_latents(clip)
