"""Of the same control, reference, mask or camera path, training reads from the cache what generator and preview build,
bit for bit, whichever of them are given."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cache_tools.settings import LATENTS_TOOL
from dataset.batching.batches import CachedDataset, collate
from dataset.batching.order import Pick
from dataset.caching.cache import save_text
from dataset.config import read_config
from dataset.reading.media import read_frames
from dataset.sources import list_items, plan_clips
from generate.jobs import parse_job
from generate.models import Models
from generate.settings import GenerateSettings
from tests.tiny.images import CLIP, make_image_models
from tests.tiny.make import VAE
from tests.unit.dataset.drawing import draw_noise, draw_video
from wan_train.cli import parse, run
from wan_train.conditions.control import dit_arguments
from wan_train.models.settings import ImageEncoderSettings, VaeSettings
from wan_train.models.variants import VARIANTS
from wan_train.sampling.decode import open_vae
from wan_train.sampling.encode import encode_clip_requests, encode_images
from wan_train.sampling.grammar import parse_line
from wan_train.sampling.request import preview_defaults

CPU = torch.device("cpu")
SOURCE, BUCKET = (60, 40), (48, 32)

CONTROL = 'control_directory = "controls"\n'
REFERENCE = 'reference_directory = "references"\n'
MASK = 'mask_directory = "masks"\n'
START = "start_image = true\n"
DIRECTION = 'camera_direction = "LeftUp"\ncamera_speed = 0.05\n'

# Of each task every way of giving it what it reads: keys of the dataset, and the options of a prompt line.
GIVEN = [
    ("fun-control-1.3B", "", ""),
    ("fun-control-1.3B", CONTROL, "--cn CONTROL"),
    ("fun-control-1.3B", CONTROL + START, "--cn CONTROL --i START"),
    ("fun-control-1.3B", CONTROL + REFERENCE, "--cn CONTROL --reference_image REFERENCE"),
    ("fun-control-1.3B", CONTROL + REFERENCE + START, "--cn CONTROL --reference_image REFERENCE --i START"),
    ("fun-control-1.3B", REFERENCE, "--reference_image REFERENCE"),
    ("i2v-14B-FC", CONTROL, "--cn CONTROL --i START"),
    ("fun-control-A14B", CONTROL, "--cn CONTROL"),
    ("fun-control-A14B", CONTROL + REFERENCE + START, "--cn CONTROL --reference_image REFERENCE --i START"),
    ("fun-camera-1.3B", DIRECTION, "--camera_direction LeftUp --camera_speed 0.05 --i START"),
    ("fun-camera-1.3B", 'camera_directory = "cameras"\n', "--camera_path CAMERA --i START"),
    ("fun-camera-A14B", DIRECTION, "--camera_direction LeftUp --camera_speed 0.05 --i START"),
    ("fun-inp-A14B", "", "--i START"),
    ("vace-1.3B", "", ""),
    ("vace-1.3B", CONTROL, "--vace_video CONTROL"),
    ("vace-1.3B", CONTROL + MASK, "--vace_video CONTROL --vace_mask MASK"),
    ("vace-1.3B", MASK, "--vace_video CLIP --vace_mask MASK"),
    ("vace-1.3B", REFERENCE, "--vace_reference REFERENCE --vace_reference ANOTHER"),
    (
        "vace-fun-A14B",
        CONTROL + MASK + REFERENCE,
        "--vace_video CONTROL --vace_mask MASK --vace_reference REFERENCE --vace_reference ANOTHER",
    ),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny.make import make_models

    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    make_image_models(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_media(folder: Path, task: str, num_frames: int) -> dict[str, Path]:
    """A clip or an image of another size than its bucket with all that may go with it; the files of a prompt line."""
    suffix = ".png" if num_frames == 1 else ".mkv"
    files = {}
    for number, name in enumerate(("media", "controls", "masks")):
        (folder / name).mkdir()
        files[name] = folder / name / f"a{suffix}"
        _draw(files[name], num_frames, seed=1000 * number)
    (folder / "media" / "a.txt").write_text("a")
    for name in ("references", "cameras"):
        (folder / name).mkdir()
    names = ("a_0.png", "a_1.png") if VARIANTS[task].control is VARIANTS["vace-1.3B"].control else ("a.png",)
    for number, name in enumerate(names):
        size = (70 + 20 * number, 100)
        Image.fromarray(draw_noise(90 + number, *size)).save(folder / "references" / name)
    files["cameras"] = folder / "cameras" / "a.txt"
    lines = [f"{k} 0.5 0.9 0.5 0.5 0 0 1 0 0 {0.01 * k} 0 1 0 0 0 0 1 {0.02 * k}" for k in range(num_frames + 2)]
    files["cameras"].write_text("\n".join(["https://example.org/video", *lines]))
    return files


def _draw(path: Path, num_frames: int, *, seed: int) -> None:
    if num_frames == 1:
        Image.fromarray(draw_noise(seed, *SOURCE)).save(path)
        return

    def draw(number: int, width: int, height: int) -> np.ndarray:
        return draw_noise(seed + number, width, height)

    draw_video(path, num_frames + 2, size=SOURCE, codec="ffv1", pix_fmt="bgr0", draw=draw)


def fill_in(line: str, folder: Path, files: dict[str, Path]) -> str:
    ((_, first),) = read_frames(files["media"], {0})
    Image.fromarray(first).save(folder / "start.png")
    references = sorted((folder / "references").iterdir())
    words = {
        **{"CONTROL": files["controls"], "MASK": files["masks"], "CLIP": files["media"], "CAMERA": files["cameras"]},
        **{"REFERENCE": references[0], "ANOTHER": references[-1], "START": folder / "start.png"},
    }
    return " ".join(str(words.get(word, word)) for word in line.split())


@pytest.mark.parametrize("num_frames", [1, 5, 13, pytest.param(81, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("task", "keys", "line"), GIVEN)
def test_cache_preview_and_generator_agree(
    task: str, keys: str, line: str, num_frames: int, models: Path, folder: Path
) -> None:
    files, variant = write_media(folder, task, num_frames), VARIANTS[task]
    write_toml(folder, keys, num_frames)
    clip = str(models / CLIP) if variant.reads_clip else ""
    options = ["--vae", str(models / VAE), "--vae_dtype", "fp32", "--clip", clip]
    words = ["--dataset_config", "data.toml", "--task", task, "--device", "cpu", *options]
    assert run(LATENTS_TOOL, words) == 0
    trained = read_batch(task)
    text = f"a --w {BUCKET[0]} --h {BUCKET[1]} --f {num_frames} --d 1 {fill_in(line, folder, files)}"
    shape = (1, 16, (num_frames - 1) // 4 + 1, BUCKET[1] // 8, BUCKET[0] // 8)
    for built in (generated(text, task, options), previewed(text, task, options)):
        assert built.keys() == trained.keys()
        for name, value in built.items():
            assert torch.equal(value, trained[name][0]), name
        arguments = dit_arguments({name: value[None] for name, value in built.items()}, variant, shape)
        assert_fits(arguments, task, shape)


def assert_fits(arguments: dict[str, Tensor], task: str, shape: tuple[int, ...]) -> None:
    behind = VARIANTS[task].in_dim - 16
    frames, height, width = shape[2:]
    if behind:
        assert arguments["image_latents"].shape == (1, behind, frames, height, width)
    if VARIANTS[task].control and "camera" in arguments:
        assert arguments["camera"].shape == (1, 24, frames, 8 * height, 8 * width)
    assert "start_latents" not in arguments and "control_latents" not in arguments


def write_toml(folder: Path, keys: str, num_frames: int) -> None:
    kind = "image" if num_frames == 1 else "video"
    (folder / "data.toml").write_text(
        f'[[datasets]]\n{kind}_directory = "media"\ncache_directory = "cache"\n{keys}'
        f"resolution = [{BUCKET[0]}, {BUCKET[1]}]\n" + (f"target_frames = [{num_frames}]\n" if num_frames > 1 else "")
    )


def read_batch(task: str) -> dict[str, Tensor]:
    """The conditions of a batch, by name, and that nothing else is in it."""
    variant = VARIANTS[task]
    (config,) = read_config("data.toml", images=variant.images, control=variant.control)
    plan = plan_clips(config, list_items(config, allow_missing_captions=False))
    for item in plan.items:
        save_text(item, {item.caption: torch.zeros(2, 8)})
    return dict(collate([CachedDataset([plan])[Pick(0)]]).extras)


def generated(line: str, task: str, options: list[str]) -> dict[str, Tensor]:
    settings = parse(GenerateSettings, ["--task", task, *options])
    request = parse_job(line, settings, 0).request
    assert (request.width, request.height) == BUCKET
    models = Models(settings, {}, CPU)
    tokens = None
    if request.clip_paths:
        with models.image_encoder() as encoder:
            tokens = models.encode_clip(encoder, request)
    with models.vae() as vae:
        built = models.encode_images(vae, request, tokens)
    return {} if built is None else dict(built.extras)


def previewed(line: str, task: str, options: list[str]) -> dict[str, Tensor]:
    request = parse_line(line, preview_defaults(VARIANTS[task]))
    (tokens,) = encode_clip_requests([request], ImageEncoderSettings(clip=options[5]), CPU)
    vae = open_vae(VaeSettings(vae=options[1], vae_dtype="fp32"), CPU)
    built = encode_images(request, vae, tokens, CPU)
    return {} if built is None else dict(built.extras)


def test_transparency_is_one_thing_for_cache_and_generator(models: Path, folder: Path) -> None:
    """Of a VACE mask it is black, of a reference white."""
    task, files = "vace-1.3B", write_media(folder, "vace-1.3B", 5)
    files["masks"].unlink()
    files["masks"] = folder / "masks" / "a.png"
    alpha = Image.fromarray(draw_noise(7, *SOURCE)).convert("L").point(lambda value: 255 * (value > 127))
    for path, size in ((files["masks"], SOURCE), *((path, (60, 80)) for path in (folder / "references").iterdir())):
        image = Image.new("RGB", size, "white" if path == files["masks"] else "blue")
        image.putalpha(alpha.resize(size))
        image.save(path)
    write_toml(folder, CONTROL + MASK + REFERENCE, 5)
    options = ["--vae", str(models / VAE), "--vae_dtype", "fp32", "--clip", ""]
    assert run(LATENTS_TOOL, ["--dataset_config", "data.toml", "--task", task, "--device", "cpu", *options]) == 0
    given = "--vace_video CONTROL --vace_mask MASK --vace_reference REFERENCE --vace_reference ANOTHER"
    line = f"a --w {BUCKET[0]} --h {BUCKET[1]} --f 5 --d 1 {fill_in(given, folder, files)}"
    built, trained = generated(line, task, options)["vace_context"], read_batch(task)["vace_context"][0]
    assert torch.equal(built, trained) and 0.2 < float(built[32:, 2:].mean()) < 0.8
