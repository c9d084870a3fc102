"""Where files go, what each type of output leaves, and what is refused beforehand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from generate.jobs import Job, make_jobs
from generate.output import Product, check_output, latent_metadata, stem_of, trimmed, write_outputs
from generate.settings import GenerateSettings
from tests.parity.golden import load_case
from tests.unit.generate.conftest import Given
from wan_train.errors import InputError
from wan_train.models.vae.vae import load_vae
from wan_train.placement.ledger import Ledger
from wan_train.sampling.decode import decode_frames

FRAMES = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)


def one_job(settings: GenerateSettings) -> Job:
    (job,) = make_jobs(settings)
    return job


def write(settings: GenerateSettings, frames: np.ndarray = FRAMES) -> list[Path]:
    job = one_job(settings)
    stem = stem_of(settings.output, job, several=False)
    latents, metadata = torch.zeros(16, 2, 4, 4), latent_metadata(job.request)
    shown = trimmed(frames, settings.output)
    return write_outputs(Product(latents, shown, 16, stem, '{"a": 1}', metadata, settings.output))


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("video", {"x.mp4"}),
        ("images", {"x"}),
        ("latent", {"x_latent.safetensors"}),
        ("both", {"x_latent.safetensors", "x.mp4"}),
        ("latent_images", {"x_latent.safetensors", "x"}),
    ],
)
def test_each_type_leaves_what_it_says(kind: str, left: set[str], given: Given, tmp_path: Path) -> None:
    settings = given("--prompt", "a", "--seed", 3, "--save_path", tmp_path / "x.mp4", "--output_type", kind)
    written = write(settings)
    assert {path.name for path in written} == left == {path.name for path in tmp_path.iterdir()}
    if "x" in left:
        images = sorted((tmp_path / "x").iterdir())
        assert [path.name for path in images] == [f"x_{i:03d}.png" for i in range(5)]
        assert all(np.array_equal(np.asarray(Image.open(path)), FRAMES[i]) for i, path in enumerate(images))
    if "x_latent.safetensors" in left:
        with safe_open(tmp_path / "x_latent.safetensors", framework="pt") as file:
            assert file.get_tensor("latent").shape == (16, 2, 4, 4)
            assert {"seeds": "3", "prompt": "a", "wan_train": '{"a": 1}'}.items() <= file.metadata().items()


def test_one_frame_is_a_image_unless_a_video_is_named(given: Given, tmp_path: Path) -> None:
    names = {"folder": ".png", "a.png": ".png", "b.mp4": ".mp4"}
    for name, suffix in names.items():
        (written,) = write(given("--prompt", "a", "--save_path", tmp_path / name), FRAMES[:1])
        assert written.suffix == suffix and written.is_file()


def test_tail_frames_are_left_out(given: Given, tmp_path: Path) -> None:
    words = ("--prompt", "a", "--save_path", tmp_path / "x.mp4", "--output_type", "images", "--trim_tail_frames", 3)
    (folder,) = write(given(*words))
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("kind", ["both", "latent_images"])
def test_what_is_held_while_a_video_is_decoded_and_written_grows_by_its_latents_alone(
    kind: str, given: Given, tmp_path: Path
) -> None:
    vae, device = load_vae(load_case("wan21_vae").state_dict()), torch.device("cpu")
    held, sizes = [], []
    for num_latents in (6, 21):
        latents = torch.randn(16, num_latents, 4, 4)
        words = ("--prompt", "a", "--save_path", tmp_path / f"{num_latents}.mp4", "--output_type", kind)
        settings = given(*words, "--trim_tail_frames", 3)
        with Ledger() as ledger:
            frames = trimmed(decode_frames(vae, latents, device), settings.output)
            write_outputs(Product(latents, frames, 16, tmp_path / str(num_latents), "", {}, settings.output))
        held.append(ledger.peak)
        sizes.append(latents.nbytes)
    extra_frames = 4 * 15 * 32 * 32 * 3  # bytes, as uint8
    assert held[1] - held[0] <= 2 * (sizes[1] - sizes[0]) < extra_frames / 2


def test_seed_and_index_are_filled_in(given: Given, tmp_path: Path) -> None:
    settings = given("--prompt", "a", "--seed", 7, "--save_path", tmp_path / "{index}_{seed}.mp4")
    assert stem_of(settings.output, one_job(settings), several=True) == tmp_path / "000_7"
    settings = given("--prompt", "a", "--seed", 7, "--save_path", tmp_path / "s{seed}")
    stem = stem_of(settings.output, one_job(settings), several=True)
    assert stem.parent == tmp_path / "s7" and stem.name.endswith("_000_7")
    settings = given("--prompt", "a", "--save_path", tmp_path / "x_latent.safetensors", "--output_type", "latent")
    assert stem_of(settings.output, one_job(settings), several=False) == tmp_path / "x"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "--save_path is missing"),
        (("--save_path", "{name}.mp4"), "unknown placeholder {name}"),
        (("--save_path", "{seed:04d}.mp4"), "unknown placeholder {seed:04d}"),
        (("--save_path", "x.webm"), r"\.webm is not supported"),
        (("--save_path", "x.JPG"), r"\.jpg is not supported"),
        (("--save_path", "x.safetensors"), "is for latent"),
        (("--save_path", "x.png", "--output_type", "latent"), "is for video and both"),
        (("--save_path", "x.png"), "an image file, not one for 5 frames"),
        (("--save_path", "x", "--trim_tail_frames", 5), "less than the number of frames, 5"),
        (("--save_path", "README.md/x"), "cannot write"),
        (("--save_path", "x", "--codec", "lossless", "--video_quality", 20), "no effect with --codec lossless"),
    ],
)
def test_bad_places_are_refused(words: tuple[object, ...], told: str, given: Given) -> None:
    settings = given("--prompt", "a", *words)
    with pytest.raises(InputError, match=told):
        check_output(settings.output, make_jobs(settings))


def test_one_name_for_several_videos_is_refused(given: Given, tmp_path: Path) -> None:
    settings = given("--prompt", "a", "--save_path", tmp_path / "x.mp4")
    job = one_job(settings)
    for jobs in ([job, job], None):
        with pytest.raises(InputError, match=r"add \{index\} to it"):
            check_output(settings.output, jobs)
    check_output(given("--save_path", tmp_path / "new" / "{index}" / "x.mp4").output, None)
    assert (tmp_path / "new").is_dir()


def test_folders_that_are_named_by_seed_are_not_made_beforehand(given: Given, tmp_path: Path) -> None:
    for place in ("{seed}/sub/x.mp4", "a/{index}/sub/{seed}"):
        settings = given("--prompt", "a", "--save_path", tmp_path / place)
        check_output(settings.output, make_jobs(settings))
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["a"]


def test_a_folder_of_the_files_name_is_refused(given: Given, tmp_path: Path) -> None:
    (tmp_path / "x.mp4").mkdir()
    settings = given("--prompt", "a", "--save_path", tmp_path / "x.mp4")
    with pytest.raises(InputError, match="is an existing folder"):
        check_output(settings.output, make_jobs(settings))


LONG = "n" * 250  # with .mp4 a name that file systems take, not with _pending_latent.safetensors


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("--save_path", "{tmp}/" + "n" * 300 + ".mp4"),
            r"too long \(\d+ bytes\); give a shorter --save_path",
        ),
        (("--save_path", "{tmp}/" + "é" * 150 + ".mp4"), "too long"),
        (("--save_path", "{tmp}/" + LONG + ".mp4"), r"_pending_latent\.safetensors is too long \(277 bytes\)"),
        (
            ("--save_path", "{tmp}/" + LONG + ".mp4", "--output_type", "both"),
            r"_latent\.safetensors is too long \(269 bytes\)",
        ),
        (
            ("--save_path", "{tmp}/" + "/".join(["d" * 200] * 20) + "/{seed}/{index}.mp4"),
            r"the path is too long \(4\d+ bytes\)",
        ),
        (("--save_path", "{tmp}/{seed}" + "n" * 300 + "/x.mp4"), "too long"),
        (("--save_path", "{tmp}/" + "n" * 300), "too long"),
        (
            ("--save_path", "{tmp}/" + "n" * 247 + ".mp4", "--output_type", "images"),
            r"_0000\.png is too long \(256 bytes\)",
        ),
    ],
)
def test_names_that_the_file_system_does_not_take_are_refused_before_sampling(
    words: tuple[str, ...], told: str, given: Given, tmp_path: Path
) -> None:
    settings = given("--prompt", "a", *(word.replace("{tmp}", str(tmp_path)) for word in words))
    with pytest.raises(InputError, match=told):
        check_output(settings.output, make_jobs(settings))


def test_a_name_of_the_usual_length_is_taken(given: Given, tmp_path: Path) -> None:
    settings = given("--prompt", "a", "--save_path", tmp_path / ("n" * 220 + ".mp4"))
    check_output(settings.output, make_jobs(settings))
    assert write(settings) == [tmp_path / ("n" * 220 + ".mp4")]
