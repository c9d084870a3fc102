"""What training reads from the cache is, bit for bit, what preview and generator build from the same sample."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from cache_tools.settings import LATENTS_TOOL
from dataset.batching.batches import CachedDataset, collate
from dataset.caching.cache import save_text
from dataset.config import read_config
from dataset.reading.media import read_frames
from dataset.sources import list_items, plan_clips
from generate.jobs import parse_job
from generate.models import Models
from generate.settings import GenerateSettings
from tests.tiny.images import CLIP, make_image_models
from tests.tiny.make import SCENES, VAE, draw_clips, draw_frames, save
from tests.tiny.vae22 import VAE22, vae22_shapes
from wan_train.cli import parse, run
from wan_train.conditions.conditions import Conditions, ImageConditions
from wan_train.models.settings import ImageEncoderSettings, VaeSettings
from wan_train.models.variants import VARIANTS
from wan_train.sampling.decode import open_vae
from wan_train.sampling.encode import encode_clip_requests, encode_images
from wan_train.sampling.grammar import parse_line
from wan_train.sampling.request import preview_defaults
from wan_train.training.objective.conditioning import conditions_of

CPU = torch.device("cpu")
SOURCE, BUCKET = (120, 80), (96, 64)
FRAMES = (1, 5, 13, pytest.param(81, marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny.make import make_models

    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    make_image_models(folder)
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two clips of another size than their bucket, or two images."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_data(folder: Path, num_frames: int) -> None:
    kind = "image" if num_frames == 1 else "video"
    if num_frames == 1:
        (folder / "media").mkdir()
        for number, caption in enumerate(list(SCENES)[:2]):
            next(draw_frames(caption, size=SOURCE)).save(folder / "media" / f"{number}.png")
            (folder / "media" / f"{number}.txt").write_text(caption)
    else:
        draw_clips(folder / "media", size=SOURCE, num_frames=num_frames + 2)
    (folder / "data.toml").write_text(
        f'[general]\nresolution = [{BUCKET[0]}, {BUCKET[1]}]\nbatch_size = 2\ncaption_extension = ".txt"\n'
        f'[[datasets]]\n{kind}_directory = "media"\ncache_directory = "cache"\n'
        + (f"target_frames = [{num_frames}]\n" if num_frames > 1 else "")
    )


@pytest.mark.parametrize("num_frames", FRAMES)
@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B"])
def test_cache_preview_and_generator_agree(task: str, num_frames: int, models: Path, folder: Path) -> None:
    write_data(folder, num_frames)
    files = ["--vae", str(models / VAE), "--clip", str(models / CLIP), "--vae_dtype", "fp32"]
    assert run(LATENTS_TOOL, ["--dataset_config", "data.toml", "--task", task, "--device", "cpu", *files]) == 0
    images = VARIANTS[task].images
    assert images is not None
    (config,) = read_config("data.toml", images=images)
    plan = plan_clips(config, list_items(config, allow_missing_captions=False))
    for item in plan.items:
        save_text(item, {item.caption: torch.zeros(2, 8)})
    dataset, number = CachedDataset([plan]), 1
    trained = conditions_of(collate([dataset[0], dataset[number]]), VARIANTS[task], CPU)

    source, lines = plan.clips[number].item.path, ""
    if num_frames == 1:
        lines = f"--i {source} --ei {source}" if images.last else f"--i {source}"
    else:
        given = dict(read_frames(source, {0, num_frames - 1}))
        for index, flag in ((0, "i"), (num_frames - 1, "ei"))[: 1 + images.last]:
            Image.fromarray(given[index]).save(folder / f"{flag}.png")
            lines += f" --{flag} {folder / f'{flag}.png'}"
    line = f"a --w {BUCKET[0]} --h {BUCKET[1]} --f {num_frames} --d 1 {lines}"

    text = Conditions((torch.zeros(1, 8),))
    for built in (generated(line, task, files), previewed(line, task, files)):
        conditions = text.with_images(built)
        assert torch.equal(conditions.extras["image_latents"][0], trained.extras["image_latents"][number])
        assert torch.equal(conditions.extras["clip_features"][0], trained.extras["clip_features"][number])
        assert not torch.equal(conditions.extras["image_latents"][0], trained.extras["image_latents"][0])
        assert conditions.extras["image_latents"].shape[1:3] == (20, 1 + (num_frames - 1) // 4)


def generated(line: str, task: str, files: list[str]) -> ImageConditions | None:
    settings = parse(GenerateSettings, ["--task", task, *files])
    request = parse_job(line, settings, 0).request
    assert (request.width, request.height) == BUCKET  # of the image's own proportions
    models = Models(settings, {}, CPU)
    with models.image_encoder() as encoder:
        tokens = models.encode_clip(encoder, request)
    with models.vae() as vae:
        return models.encode_images(vae, request, tokens)


def previewed(line: str, task: str, files: list[str]) -> ImageConditions | None:
    request = parse_line(line, preview_defaults(VARIANTS[task]))
    (tokens,) = encode_clip_requests([request], ImageEncoderSettings(clip=files[3]), CPU)
    return encode_images(request, open_vae(VaeSettings(vae=files[1], vae_dtype="fp32"), CPU), tokens, CPU)


@pytest.mark.parametrize("num_frames", (5, 13, pytest.param(121, marks=pytest.mark.slow)))
def test_the_first_frame_of_the_5b(num_frames: int, models: Path, folder: Path) -> None:
    """A clip's first latent frame, which training gives, is what preview and generator encode of its image."""
    save(models / VAE22, vae22_shapes(), torch.float32)
    write_data(folder, num_frames)
    files = ["--vae", str(models / VAE22), "--vae_dtype", "fp32", "--clip", ""]
    words = ["--dataset_config", "data.toml", "--task", "ti2v-5B", "--device", "cpu", *files[:4]]
    assert run(LATENTS_TOOL, words) == 0
    variant = VARIANTS["ti2v-5B"]
    (config,) = read_config("data.toml", images=variant.images, space=variant.space)
    plan = plan_clips(config, list_items(config, allow_missing_captions=False))
    for item in plan.items:
        save_text(item, {item.caption: torch.zeros(2, 8)})
    trained = conditions_of(collate([CachedDataset([plan])[1]]), variant, CPU)
    assert trained.first_frame is not None and trained.has_first is not None and trained.has_first.all()
    given = dict(read_frames(plan.clips[1].item.path, {0}))
    Image.fromarray(given[0]).save(folder / "first.png")
    line = f"a --w {BUCKET[0]} --h {BUCKET[1]} --f {num_frames} --d 1 --i {folder / 'first.png'}"
    settings = parse(GenerateSettings, ["--task", "ti2v-5B", *files])
    made = Models(settings, {}, CPU)
    with made.vae() as vae:
        built = made.encode_images(vae, parse_job(line, settings, 0).request, None)
    request = parse_line(line, preview_defaults(variant))
    shown = encode_images(request, open_vae(VaeSettings(vae=files[1], vae_dtype="fp32"), CPU), None, CPU)
    assert built is not None and shown is not None and built.first is not None and shown.first is not None
    assert torch.equal(built.first, trained.first_frame[0])
    assert torch.equal(shown.first, trained.first_frame[0])
