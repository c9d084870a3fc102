from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from cache_tools.extras import average_cells, to_pixels
from cache_tools.settings import LATENTS_TOOL
from dataset.batching.batches import CachedDataset, collate
from dataset.batching.order import Pick
from dataset.caching.cache import latents_path, read_extra, read_latents, save_text
from dataset.caching.extras import CONTROL, CONTROL_FLIPPED, FLIPPED, MASK
from dataset.config import read_config
from dataset.reading.media import load_clips
from dataset.sources import list_items, plan_clips
from tests.unit.dataset.drawing import draw_frame, draw_video, make_clips, write_toml
from wan_train.cli import run
from wan_train.models.vae.vae import Geometry, WanVAE
from wan_train.storage import read_header, read_tensors, save_tensors

SIZE = (64, 48)
TOML = """
[[datasets]]
video_directory = "clips"
cache_directory = "cache"
resolution = [64, 48]
target_frames = [9]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_clips(tmp_path / "clips", {"a": 9, "b": 10})
    (tmp_path / "masks").mkdir()
    (tmp_path / "controls").mkdir()
    return tmp_path


@pytest.fixture
def cache(vae_path, folder):
    def start(lines, *more):
        write_toml(folder / "data.toml", TOML + lines)
        return run(
            LATENTS_TOOL,
            ["--dataset_config", "data.toml", "--vae", str(vae_path), "--device", "cpu", "--vae_dtype", "fp32", *more],
        )

    return start


def planned():
    (config,) = read_config("data.toml")
    return plan_clips(config, list_items(config, allow_missing_captions=False))


def encode(vae_path, images):
    vae = WanVAE(Geometry(8, (8, 8, 8, 8), 1))
    vae.load_state_dict(dict(read_tensors(vae_path)))
    with torch.no_grad():
        return vae.eval().encode(to_pixels(torch.from_numpy(images)[None]))[0]


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_flip_augment_caches_the_mirrored_clip_beside(cache, vae_path, capsys):
    assert cache("") == 0
    plain = [read_latents(clip) for clip in planned().clips]
    assert cache("flip_augment = true") == 0
    assert "2 encoded" in last_line(capsys)
    for clip, before in zip(planned().clips, plain, strict=True):
        (images,) = load_clips([clip])
        mirrored = encode(vae_path, np.ascontiguousarray(images[:, :, ::-1]))
        torch.testing.assert_close(read_extra(clip, FLIPPED), mirrored, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(read_latents(clip), before)
        assert "latents_flipped_3x6x8_float32" in read_header(latents_path(clip)).shapes
    assert cache("flip_augment = true") == 0
    assert "0 encoded" in last_line(capsys)


def test_samples_are_mirrored_every_other_time_by_key(cache):
    cache('flip_augment = true\nmask_directory = "masks"')
    plan = planned()
    for item in plan.items:
        save_text(item, {item.caption: torch.zeros(2, 8)})
    dataset = CachedDataset([plan])
    picks = [dataset.pick(0, 0, seed=3, epoch=epoch) for epoch in range(100)]
    assert picks == [dataset.pick(0, 0, seed=3, epoch=epoch) for epoch in range(100)]
    assert 30 < sum(pick.flipped for pick in picks) < 70
    assert len({a.flipped == b.flipped for a, b in pairwise(picks)}) == 2
    clip = plan.clips[0]
    assert torch.equal(dataset[Pick(0, flipped=True)].latents, read_extra(clip, FLIPPED))
    assert torch.equal(dataset[Pick(0)].latents, read_latents(clip))


def test_a_mask_is_averaged_to_latent_cells_and_its_weights_to_one(cache, folder):
    mask = np.zeros((48, 64, 3), np.uint8)
    mask[:, :16] = 255
    mask[:, 16:20] = 255  # half of the third cell
    Image.fromarray(mask).save("masks/a.png")
    assert cache('mask_directory = "masks"\nflip_augment = true') == 0
    plan = planned()
    kept = read_extra(plan.clips[0], MASK)
    assert kept.shape == (3, 6, 8)
    assert kept.dtype == torch.float16
    torch.testing.assert_close(kept[1, 2], torch.tensor([1, 1, 0.5, 0, 0, 0, 0, 0], dtype=torch.float16))
    for item in plan.items:
        save_text(item, {item.caption: torch.zeros(2, 8)})
    dataset = CachedDataset([plan])
    weights = dataset[0].weights
    assert weights.mean() == pytest.approx(1)
    torch.testing.assert_close(weights[0, 0], torch.tensor([1, 1, 0.5, 0, 0, 0, 0, 0]) * 3.2)
    assert torch.equal(dataset[Pick(0, flipped=True)].weights, weights.flip(-1))
    batch = collate([dataset[0], dataset[1]])
    assert batch.weights.shape == (2, 1, 3, 6, 8)
    assert torch.equal(batch.weights[1], torch.ones(1, 3, 6, 8))
    assert collate([dataset[1]]).weights is None


def test_frames_of_a_mask_video_go_first_alone_and_then_by_four():
    images = np.zeros((9, 16, 16, 3), np.uint8)
    images[0], images[1:3], images[8] = 255, 255, 255
    cells = average_cells(images)
    assert cells.shape == (3, 2, 2)
    assert cells[:, 0, 0] == pytest.approx([1, 0.5, 0.25])


def test_a_mask_video_is_taken_at_the_frames_of_the_clip(cache, folder):
    make_clips(folder / "clips", {"a": 18}, fps=32)
    folder.joinpath("clips/b.mp4").unlink()

    def draw(number, width, height):
        return np.full((height, width, 3), 255 if number in (0, 2, 8) else 0, np.uint8)

    draw_video(folder / "masks/a.mkv", 18, fps=32, codec="ffv1", draw=draw)
    assert cache('mask_directory = "masks"\nsource_fps = 32') == 0
    (clip,) = planned().clips
    assert clip.frames == tuple(range(0, 18, 2))
    torch.testing.assert_close(read_extra(clip, MASK)[:, 0, 0].float(), torch.tensor([1, 0.5, 0]), atol=0.01, rtol=0)


def test_a_mask_of_another_size_is_stretched_and_cropped_like_the_clip(cache, folder):
    make_clips(folder / "clips", {"a": 9}, size=(128, 48))  # its middle 64 columns are kept
    mask = np.zeros((24, 64, 3), np.uint8)
    mask[:, 16:20] = 255  # columns 32 to 40 of the video, 0 to 8 of the crop
    Image.fromarray(mask).save("masks/a.png")
    assert cache('mask_directory = "masks"') == 0
    assert read_extra(planned().clips[0], MASK)[0, 0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


def test_a_mask_without_white_is_an_error_that_names_the_file(cache, capsys):
    Image.new("RGB", SIZE).save("masks/b.png")
    assert cache('mask_directory = "masks"') == 2
    told = capsys.readouterr().err
    assert "masks/b.png is all black for clips/b.mp4 from frame 0" in told


def test_a_clip_without_an_opaque_pixel_is_an_error_that_says_so(cache, folder, capsys):
    hidden = [Image.new("RGBA", SIZE, (20 * i, 0, 0, 0)) for i in range(9)]
    hidden[0].save(folder / "clips" / "c.webp", save_all=True, append_images=hidden[1:], lossless=True, exact=True)
    (folder / "clips" / "c.txt").write_text("c")
    assert cache("alpha_mask = true") == 2
    assert "clips/c.webp is fully transparent from frame 0, so with alpha_mask nothing" in capsys.readouterr().err


def test_a_mask_that_is_too_short_is_an_error(cache, folder, capsys):
    draw_video(folder / "masks/a.mp4", 5)
    assert cache('mask_directory = "masks"') == 2
    assert "the mask has 5 frames, fewer than clips/a.mp4" in capsys.readouterr().err


def test_a_changed_mask_is_cached_again(cache, capsys):
    Image.new("RGB", SIZE, "white").save("masks/a.png")
    cache('mask_directory = "masks"')
    capsys.readouterr()
    Image.new("RGB", SIZE, (9, 9, 9)).save("masks/a.png")
    assert cache('mask_directory = "masks"') == 0
    assert "1 encoded" in last_line(capsys)
    assert cache('mask_directory = "masks"') == 0
    assert "0 encoded" in last_line(capsys)


@pytest.mark.parametrize("num_frames", [9, 4, 12])
def test_a_control_is_cached_and_ends_as_the_clip_does(cache, folder, vae_path, num_frames):
    folder.joinpath("clips/b.mp4").unlink()
    draw_video(
        folder / "controls/a.mkv",
        num_frames,
        codec="ffv1",
        draw=lambda number, width, height: draw_frame(200 - number, width, height),
    )
    assert cache('control_directory = "controls"\nflip_augment = true') == 0
    (clip,) = planned().clips
    drawn = np.stack([draw_frame(200 - min(index, num_frames - 1)) for index in range(9)])
    expected = encode(vae_path, drawn)
    torch.testing.assert_close(read_extra(clip, CONTROL), expected, atol=0.02, rtol=0.02)
    mirrored = encode(vae_path, np.ascontiguousarray(drawn[:, :, ::-1]))
    torch.testing.assert_close(read_extra(clip, CONTROL_FLIPPED), mirrored, atol=0.02, rtol=0.02)
    assert "latents_control_3x6x8_float32" in read_header(latents_path(clip)).shapes


def test_a_control_image_is_resized_like_the_image(cache, folder, vae_path):
    (folder / "stills").mkdir()
    image = cv2.resize(draw_frame(5), (128, 96), interpolation=cv2.INTER_NEAREST)
    Image.fromarray(image).save("stills/s.png")
    Path("stills/s.txt").write_text("a still")
    Image.fromarray(image).save("controls/s_0.png")
    folder.joinpath("data.toml").write_text("")
    lines = '\n[[datasets]]\nimage_directory = "stills"\nresolution = [64, 48]\ncontrol_directory = "controls"'
    assert cache(lines) == 0
    config = read_config("data.toml")[1]
    (clip,) = plan_clips(config, list_items(config, allow_missing_captions=False)).clips
    assert torch.equal(read_extra(clip, CONTROL), read_latents(clip))


STILLS = """
[[datasets]]
image_directory = "stills"
cache_directory = "cache"
resolution = [64, 48]
"""


@pytest.fixture
def still(folder):
    """stills/s.png, of which the right half is transparent, and green there."""
    (folder / "stills").mkdir()
    image = Image.new("RGBA", SIZE, (100, 100, 100, 255))
    image.paste((0, 255, 0, 0), (32, 0, 64, 48))
    image.save("stills/s.png")
    Path("stills/s.txt").write_text("a still")
    return Path("stills/s.png")


def cache_stills(vae_path, lines):
    options = ["--dataset_config", "data.toml", "--vae", str(vae_path), "--device", "cpu", "--vae_dtype", "fp32"]
    write_toml(Path("data.toml"), STILLS + lines)
    return run(LATENTS_TOOL, options)


def test_transparency_is_cached_on_its_background_and_again_on_another(still, vae_path, capsys):
    for lines, colour in (("", (255, 255, 255)), ('alpha_background = "#102030"', (16, 32, 48))):
        assert cache_stills(vae_path, lines) == 0
        assert "1 encoded" in last_line(capsys)
        drawn = np.full((1, 48, 64, 3), 100, np.uint8)
        drawn[:, :, 32:] = colour
        torch.testing.assert_close(read_latents(planned().clips[0]), encode(vae_path, drawn), atol=1e-4, rtol=1e-4)
        assert cache_stills(vae_path, lines) == 0
        assert "0 encoded" in last_line(capsys)
    Image.new("RGB", SIZE).save(still)
    assert cache_stills(vae_path, "") == 0 and cache_stills(vae_path, 'alpha_background = "#102030"') == 0
    assert "0 encoded" in last_line(capsys)  # a file without transparency is the same on any background


def test_the_alpha_is_the_mask_on_request(still, vae_path, capsys):
    assert cache_stills(vae_path, "") == 0 and cache_stills(vae_path, "alpha_mask = true") == 0
    assert "1 encoded" in last_line(capsys)
    assert read_extra(planned().clips[0], MASK)[0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert cache_stills(vae_path, "alpha_mask = true") == 0
    assert "0 encoded" in last_line(capsys)


def test_what_is_transparent_in_a_mask_does_not_count(cache, folder):
    image = Image.new("RGBA", SIZE, (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (0, 0, 32, 48))
    image.save("masks/a.png")
    assert cache('mask_directory = "masks"') == 0
    assert read_extra(planned().clips[0], MASK)[0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_a_mask_of_16_bits_counts_as_much_as_it_says(cache, capsys):
    values = np.full((48, 64), 65535, np.uint16)
    values[:, 32:] = 20000
    Image.fromarray(values).save("masks/a.png")
    assert cache('mask_directory = "masks"') == 0
    clip = planned().clips[0]
    assert read_extra(clip, MASK)[0, 0].tolist() == pytest.approx([1] * 4 + [20000 / 65535] * 4, abs=2e-3)
    # Caches from before masks of 16 bits were read right are made again.
    path, header = latents_path(clip), read_header(latents_path(clip))
    old = header.metadata["wan_train_recipe"].replace("grey 16-bit", "")
    save_tensors(path, dict(read_tensors(path)), header.metadata | {"wan_train_recipe": old})
    capsys.readouterr()
    assert cache('mask_directory = "masks"') == 0
    told = capsys.readouterr().err
    assert "1 encoded" in told and "mask is now processed differently (then as decoded, now grey 16-bit)" in told


def test_a_control_of_16_bits_is_cached_as_grey(cache, folder, vae_path):
    folder.joinpath("clips/b.mp4").unlink()
    (folder / "controls/a").mkdir()
    for number in range(9):
        Image.fromarray(np.full((48, 64), number * 5140, np.uint16)).save(folder / f"controls/a/{number}.png")
    assert cache('control_directory = "controls"') == 0
    drawn = np.stack([np.full((48, 64, 3), number * 20, np.uint8) for number in range(9)])
    expected = encode(vae_path, drawn)
    torch.testing.assert_close(read_extra(planned().clips[0], CONTROL), expected, atol=1e-4, rtol=1e-4)
