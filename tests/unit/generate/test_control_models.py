"""Control models from prompt to video, on tiny weights: every task, what acts when, what stays out of the video."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import wan_train
from generate.jobs import make_jobs
from generate.main import main
from generate.settings import GenerateSettings
from tests.tiny.control import CONTROLLER, TASKS, make_control_models
from tests.tiny.images import CLIP, make_image_models
from tests.tiny.make import SCENES, T5, VAE, draw_frames, make_models
from wan_train.cli import parse
from wan_train.errors import InputError
from wan_train.media_out import write_image, write_video
from wan_train.models.dit.dit import Dit
from wan_train.models.loading import load_dit
from wan_train.models.variants import VARIANTS
from wan_train.sampling.decode import decode_frames, open_vae
from wan_train.sampling.denoise import sample_latents
from wan_train.sampling.encode import encode_clip_requests, encode_images, encode_texts
from wan_train.sampling.grammar import parse_line
from wan_train.sampling.request import preview_defaults

Make = Callable[..., np.ndarray]
SIZE = (48, 32)
CONTROL, IMAGE, OTHER = "control.mp4", "first.png", "last.png"
# By task, what it is given: each a video of its own.
GIVEN: dict[str, list[dict[str, Any]]] = {
    "fun-control-1.3B": [
        {},
        {"control_path": CONTROL},
        {"control_path": CONTROL, "control_end": 0.5},
        {"control_path": CONTROL, "control_strength": 0.5},
        {"control_path": CONTROL, "image_path": IMAGE},
        {"control_path": CONTROL, "reference_image": IMAGE},
        {"control_path": CONTROL, "image_path": IMAGE, "reference_image": OTHER},
    ],
    "i2v-14B-FC": [{"image_path": IMAGE}, {"image_path": IMAGE, "control_path": CONTROL}],
    "fun-camera-1.3B": [
        {"image_path": IMAGE, "camera_direction": "Left"},
        {"image_path": IMAGE, "camera_direction": "In", "camera_speed": 0.1},
        {"image_path": IMAGE, "camera_path": "camera.txt"},
    ],
    "vace-1.3B": [
        {},
        {"vace_scale": 0.0},
        {"vace_scale": 0.5},
        {"vace_video": CONTROL},
        {"vace_video": CONTROL, "control_start": 0.5},
        {"vace_video": CONTROL, "vace_mask": "mask.png"},
        {"vace_video": CONTROL, "vace_pad": "8,0,8,0"},
        {"vace_reference": (IMAGE,)},
        {"vace_reference": (IMAGE, OTHER)},
    ],
    "fun-control-A14B": [
        {},
        {"control_path": CONTROL},
        {"control_path": CONTROL, "image_path": IMAGE},
        {"control_path": CONTROL, "reference_image": IMAGE},
    ],
    "fun-camera-A14B": [{"image_path": IMAGE, "camera_direction": name} for name in ("Left", "Right")],
    "fun-inp-A14B": [{"image_path": IMAGE}, {"image_path": IMAGE, "end_image_path": OTHER}],
    "vace-fun-A14B": [{"vace_video": CONTROL}, {"vace_video": CONTROL, "vace_reference": (IMAGE,)}],
    "t2v-1.3B": [{}, {"motion_bucket_id": 0}, {"motion_bucket_id": 100}],
}


@pytest.fixture(scope="module")
def control_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny control models, and what they are given."""
    folder = tmp_path_factory.mktemp("control")
    make_models(folder)
    make_image_models(folder)
    make_control_models(folder)
    frames = np.stack([np.asarray(image) for image in draw_frames(next(iter(SCENES)), size=SIZE, num_frames=9)])
    write_video(folder / CONTROL, frames, fps=16)
    write_image(folder / "mask.png", (np.indices((32, 48))[1][..., None].repeat(3, axis=2) * 5).astype(np.uint8))
    line = "0 0.5 0.9 0.5 0.5 0 0 1 0 {} 0 0 1 0 0 0 0 1 0\n"
    (folder / "camera.txt").write_text("".join(line.format(i / 50) for i in range(9)))
    return folder


@pytest.fixture
def make(control_models: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`make(task, steps=..., **options)`: the frames of a small video of a task."""
    monkeypatch.chdir(control_models)

    def made(task: str, *, steps: int = 2, length: int = 5, **options: Any) -> np.ndarray:
        dit = f"{TASKS[task]}.safetensors"
        files = {"dit": dit, "vae": VAE, "t5": T5, "clip": CLIP}
        if VARIANTS[task].experts:
            files["dit_high_noise"] = dit
        chosen = {"video_size": SIZE, "video_length": length, "infer_steps": steps, "exact_size": True}
        return wan_train.generate("a red circle", task=task, device="cpu", seed=1, **(files | chosen | options))

    return made


@pytest.mark.parametrize("task", GIVEN)
def test_every_input_of_a_task_tells_in_its_video(task: str, make: Make) -> None:
    videos = [make(task, **given) for given in GIVEN[task]]
    assert {video.shape for video in videos} == {(5, 32, 48, 3)}  # references add no frames
    for number, video in enumerate(videos):
        assert not any(np.array_equal(video, other) for other in videos[:number]), GIVEN[task][number]


@pytest.mark.parametrize("num_frames", [1, 13])
def test_other_lengths(num_frames: int, make: Make) -> None:
    assert len(make("vace-1.3B", length=num_frames, vace_reference=(IMAGE, OTHER))) == num_frames
    made = make("fun-camera-1.3B", length=num_frames, image_path=IMAGE, camera_direction="Up")
    assert len(made) == num_frames
    # A control of nine frames makes at most nine.
    assert len(make("fun-control-1.3B", length=num_frames, control_path=CONTROL)) == min(num_frames, 9)


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("vace-1.3B", {"vace_video": CONTROL, "vace_reference": (IMAGE, OTHER)}),
        ("fun-camera-1.3B", {"image_path": IMAGE, "camera_direction": "Up"}),
        ("fun-control-A14B", {"control_path": CONTROL, "reference_image": IMAGE}),
    ],
)
def test_windows_of_a_control_model(task: str, given: dict[str, Any], make: Make) -> None:
    """Three latent frames: windows of two overlap in the middle one, a window of three is the whole video."""
    plain = make(task, length=9, **given)
    assert np.array_equal(make(task, length=9, sliding_window_size=3, **given), plain)
    windows = make(task, length=9, sliding_window_size=2, sliding_window_stride=1, **given)
    assert windows.shape == plain.shape and not np.array_equal(windows, plain)


def test_vace_scaled_by_zero_is_the_base(make: Make, control_models: Path) -> None:
    base = {k: v for k, v in load_file("vace.safetensors").items() if not k.startswith("vace_")}
    save_file(base, control_models / "base.safetensors")
    options = {"flow_shift": 5.0, "guidance_scale": 3.0}
    scaled = make("vace-1.3B", vace_scale=0.0, vace_video=CONTROL, vace_reference=(IMAGE,), **options)
    plain = make("t2v-1.3B", dit="base.safetensors", **options)
    assert np.array_equal(scaled, plain)


def test_a_control_outside_of_its_steps_is_none(make: Make) -> None:
    """No control is zeros in its channels; and VACE adds nothing to the base."""
    none = make("fun-control-1.3B")
    for given in ({"control_strength": 0.0}, {"control_start": 0.0, "control_end": 0.1}):
        assert np.array_equal(make("fun-control-1.3B", control_path=CONTROL, **given), none)
    ended = make("vace-1.3B", vace_video=CONTROL, control_end=0.1)
    assert np.array_equal(ended, make("vace-1.3B", vace_scale=0.0))


@pytest.mark.parametrize(
    "task",
    [
        "fun-control-A14B",
        *(
            pytest.param(task, marks=pytest.mark.slow)
            for task in ("vace-1.3B", "fun-control-1.3B", "fun-camera-1.3B", "t2v-1.3B")
        ),
    ],
)
def test_merged_guidance_is_the_same_and_skipped_guidance_works(task: str, make: Make) -> None:
    given = GIVEN[task][-1]
    plain = make(task, **given).astype(int)
    merged = make(task, cfg_merge=True, **given)
    assert np.abs(plain - merged).mean() < 2  # other sums, in bfloat16
    skipped = make(task, cfg_skip_mode="late", cfg_apply_ratio=0.5, **given)
    layers = make(task, slg_layers="1", slg_end=1.0, **given)
    assert skipped.shape == layers.shape == plain.shape
    assert not np.array_equal(skipped, plain) and not np.array_equal(layers, plain)


def test_streamed_blocks_make_the_same(make: Make) -> None:
    given = {"vace_video": CONTROL, "vace_reference": (IMAGE,)}
    assert np.array_equal(make("vace-1.3B", **given), make("vace-1.3B", blocks_to_swap=1, **given))


def test_video_to_video_with_references(make: Make) -> None:
    given = {"vace_reference": (IMAGE,), "video_path": CONTROL, "denoising_strength": 0.5}
    made = make("vace-1.3B", **given)
    assert made.shape == (5, 32, 48, 3) and not np.array_equal(made, make("vace-1.3B", vace_reference=(IMAGE,)))


def test_a_motion_controller_in_a_file_of_its_own(make: Make, control_models: Path) -> None:
    whole = load_file("speed.safetensors")
    save_file({k: v for k, v in whole.items() if "motion" not in k}, control_models / "still.safetensors")
    own = {k.removeprefix("motion_controller."): v for k, v in whole.items() if "motion" in k}
    save_file(own, control_models / CONTROLLER)
    given = {"dit": "still.safetensors", "motion_bucket_id": 100}
    beside = make("t2v-1.3B", motion_controller=CONTROLLER, **given)
    assert np.array_equal(beside, make("t2v-1.3B", motion_bucket_id=100))
    with pytest.raises(InputError, match=r"--motion_bucket_id: still\.safetensors has no motion controller"):
        make("t2v-1.3B", **given)


def test_what_the_models_lack_is_refused(make: Make) -> None:
    with pytest.raises(InputError, match=r"--reference_image: fun-control\.safetensors has no layers .*V1\.1"):
        make("fun-control-1.3B", dit="fun-control.safetensors", reference_image=IMAGE)
    with pytest.raises(InputError, match=r"--clip is missing: --task fun-control-1\.3B"):
        make("fun-control-1.3B", clip="", image_path=IMAGE)
    assert len(make("fun-control-1.3B", clip="", control_path=CONTROL)) == 5
    with pytest.raises(InputError, match="--vae is missing"):
        make("vace-1.3B", vae="")


RECORDED = {
    "fun-control-1.3B": ["--control_path", CONTROL, "--control_start", "0.1", "--control_strength", "0.75"],
    "fun-camera-1.3B": [
        *("--image_path", IMAGE, "--camera_direction", "LeftUp", "--camera_speed", "0.05"),
        *("--camera_origin", "0,0.5,0.9,0.5,0.5,0,0,1,0,0,0,0,1,0,0,0,0,1,0.25"),
    ],
    "vace-1.3B": [
        *("--vace_video", CONTROL, "--vace_mask", "mask.png", "--vace_pad", "8", "--vace_scale", "0.5"),
        *("--vace_reference", IMAGE, OTHER),
    ],
    "t2v-1.3B": ["--motion_bucket_id", "0"],
}


@pytest.mark.parametrize("task", RECORDED)
def test_the_record_makes_it_again(
    task: str, control_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(control_models)
    words = [
        *("--task", task, "--dit", f"{TASKS[task]}.safetensors", "--vae", VAE, "--t5", T5, "--clip", CLIP),
        *("--video_size", "48", "32", "--video_length", "5", "--infer_steps", "2", "--device", "cpu", "--seed", "4"),
        *("--prompt", "a circle", "--output_type", "latent", "--save_path", str(tmp_path / "made"), *RECORDED[task]),
    ]
    main(parse(GenerateSettings, words))
    (first,) = (tmp_path / "made").glob("*_latent.safetensors")
    again = parse(GenerateSettings, ["--from_metadata", str(first), "--save_path", str(tmp_path / "again")])
    (one,), (other,) = make_jobs(parse(GenerateSettings, words)), make_jobs(again)
    settled = {"shift": other.request.noise_shift, "exact_size": other.request.exact_size}  # what records state
    assert replace(one.request, **settled) == other.request
    main(again)
    (second,) = (tmp_path / "again").glob("*_latent.safetensors")
    latents = load_file(first)["latent"]
    assert latents.shape == (16, 2, 4, 6)  # without those of the references
    assert torch.equal(latents, load_file(second)["latent"])


def test_lines_of_a_file_have_inputs_of_their_own(
    make: Make, control_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ("", f" --vace_reference {IMAGE}", f" --vace_video {CONTROL}", f" --vace_reference {IMAGE} --vace_scale 0")
    (tmp_path / "lines.txt").write_text("".join(f"a red circle{line}\n" for line in lines))
    monkeypatch.chdir(control_models)
    words = [
        *("--task", "vace-1.3B", "--dit", "vace.safetensors", "--vae", VAE, "--t5", T5, "--device", "cpu"),
        *("--video_size", "48", "32", "--video_length", "5", "--infer_steps", "2", "--seed", "1"),
        *("--from_file", str(tmp_path / "lines.txt"), "--output_type", "latent"),
        *("--save_path", str(tmp_path / "{index}_latent.safetensors")),
    ]
    main(parse(GenerateSettings, words))
    found = [load_file(tmp_path / f"{index:03d}_latent.safetensors")["latent"] for index in range(len(lines))]
    assert {latents.shape for latents in found} == {(16, 2, 4, 6)}
    assert not any(torch.equal(one, other) for i, one in enumerate(found) for other in found[:i])


@pytest.mark.parametrize("task", ["fun-control-1.3B", "vace-1.3B", "fun-camera-1.3B"])
def test_a_preview_is_the_generators_video(task: str, make: Make) -> None:
    """Previews take their requests from lines, and sample with the model in training."""
    given = GIVEN[task][-1]
    names = {"control_path": "cn", "image_path": "i"}
    several = [(names.get(k, k), v) for k, vs in given.items() for v in (vs if isinstance(vs, tuple) else (vs,))]
    words = " ".join(f"--{name} {value}" for name, value in several)
    line = f"a red circle --w 48 --h 32 --exact_size --f 5 --s 2 --d 1 {words}"
    request = parse_line(line, preview_defaults(VARIANTS[task]))
    settings = parse(GenerateSettings, ["--task", task, "--vae", VAE, "--t5", T5, "--clip", CLIP])
    cpu = torch.device("cpu")
    texts = encode_texts([request.prompt, request.negative_prompt], settings.text, cpu)
    (tokens,) = encode_clip_requests([request], settings.image, cpu)
    vae = open_vae(settings.vae, cpu)
    images = encode_images(request, vae, tokens, cpu)
    model = load_dit(f"{TASKS[task]}.safetensors")
    assert isinstance(model, Dit)
    both = (texts[text].with_images(images) for text in (request.prompt, request.negative_prompt))
    latents = sample_latents(model, request, *both, device=cpu, quiet=True)
    assert np.array_equal(np.stack(list(decode_frames(vae, latents, cpu))), make(task, **given))
