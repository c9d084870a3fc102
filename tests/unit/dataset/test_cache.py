from pathlib import Path

import pytest
import torch

from dataset.cache import (
    has_latents,
    has_text,
    latents_path,
    read_latents,
    read_text,
    save_latents,
    save_text,
    text_path,
)
from dataset.config import DatasetConfig
from dataset.items import Clip, Item
from wan_train.cli import InputError
from wan_train.storage import read_header, save_tensors


def make_item(folder, *, is_video=True, name="press_a.mp4", caption="a press"):
    return Item(DatasetConfig(folder / "data.toml", 1, is_video, folder, folder / "cache"), folder / name, caption)


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
    save_text(item, embedding)
    header = read_header(text_path(item))
    assert header.shapes == {"varlen_t5_bfloat16": (9, 32)}
    assert header.metadata == {"architecture": "wan", "caption1": "a press", "format_version": "1.0.1"}
    assert torch.equal(read_text(item), embedding.bfloat16())


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
    save_text(clip.item, torch.randn(40, 32))
    for path in (latents_path(clip), text_path(clip.item)):
        path.write_bytes(path.read_bytes()[:length])
    assert not has_latents(clip)
    assert not has_text(clip.item)


def test_text_counts_only_for_this_caption(tmp_path):
    save_text(make_item(tmp_path), torch.randn(9, 32))
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
    with pytest.raises(InputError, match="finite in float16"):
        save_latents(clip, random_latents(clip) * 1e6, torch.float16)
    with pytest.raises(InputError, match=r"press_a\.mp4"):
        save_text(clip.item, torch.full((2, 4), float("inf")))
    assert not (tmp_path / "cache").exists()


def test_a_file_that_vanishes_is_an_error_with_its_name(tmp_path):
    clip = make_clip(tmp_path)
    with pytest.raises(InputError, match="press_a_00007"):
        read_latents(clip)
    save_tensors(latents_path(clip), {"other": torch.zeros(1)})
    with pytest.raises(InputError, match="press_a_00007"):
        read_latents(clip)
