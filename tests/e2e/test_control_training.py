"""Control models trained as a user trains them: LoRA and full, resumed, from a plain base, and a motion controller."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.tiny.control import CONTROLLER, TASKS, controller_shapes, make_control_models
from tests.tiny.images import CLIP, make_image_models
from tests.tiny.make import DIT, T5, VAE, draw_weight
from wan_train.models.variants import VARIANTS

Tool = Callable[..., None]
Weights = dict[str, torch.Tensor]

CONTROLS = 'control_directory = "{0}/controls"\n'
REFERENCES = 'reference_directory = "{0}/references"\n'
KEYS = {
    "fun-control-1.3B": CONTROLS + REFERENCES + "start_image = true\n",
    "i2v-14B-FC": CONTROLS,
    "fun-camera-1.3B": 'camera_direction = "LeftUp"\ncamera_speed = 0.02\n',
    "vace-1.3B": CONTROLS + REFERENCES,
    "fun-control-A14B": CONTROLS + REFERENCES,
    "fun-camera-A14B": 'camera_direction = "In"\n',
    "fun-inp-A14B": "",
    "vace-fun-A14B": CONTROLS,
    "t2v-1.3B": "motion_bucket_id = 70\n",
}
# What of each model shows that it was trained by its controls, a part of it.
OWN = {
    "fun-control-1.3B": "ref_conv.weight",
    "i2v-14B-FC": "patch_embedding.weight",
    "fun-camera-1.3B": "control_adapter.conv.weight",
    "vace-1.3B": "vace_patch_embedding.weight",
    "fun-control-A14B": "ref_conv.weight",
    "fun-camera-A14B": "control_adapter.conv.weight",
    "fun-inp-A14B": "patch_embedding.weight",
    "vace-fun-A14B": "vace_patch_embedding.weight",
    "t2v-1.3B": "motion_controller.linear.0.weight",
}

CONVOLUTIONS = {  # by a submodule, what asks for a LoRA on it
    "ref_conv": ("--network_args", "include_patterns=['ref_conv']", "conv_dim=3"),
    "control_adapter": ("--network_args", r"include_patterns=['control_adapter\..*']"),
}


class Desk:
    """A folder with tiny control models and, for each task, caches of two clips and what controls them."""

    def __init__(self, folder: Path, run_tool: Tool) -> None:
        self.folder, self.run_tool = folder, run_tool
        self.cached: set[str] = set()

    def data(self, task: str, keys: str | None = None) -> Path:
        path = self.folder / f"{task}.toml"
        keys = (KEYS[task] if keys is None else keys).format(self.folder)
        path.write_text(
            f'[general]\nresolution = [48, 32]\nbatch_size = 2\n[[datasets]]\nvideo_directory = "{self.folder}/clips"\n'
            f'cache_directory = "{self.folder}/cache_{task}"\ntarget_frames = [5]\nframe_extraction = "head"\n{keys}'
        )
        return path

    def cache(self, task: str) -> Path:
        data = self.data(task)
        if task not in self.cached:
            self.cache_latents(task, data)
            self.run_tool("wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--t5", self.folder / T5)
            self.cached.add(task)
        return data

    def cache_latents(self, task: str, data: Path) -> None:
        clip = ("--clip", self.folder / CLIP) if VARIANTS[task].reads_clip else ()
        files = ("--vae", self.folder / VAE, *clip)
        self.run_tool("wan_cache_latents.py", "--dataset_config", data, "--task", task, *files)

    def training(self, task: str, name: str, *more: object, dit: str = "") -> list[object]:
        return [
            *("--task", task, "--dit", self.folder / (dit or f"{TASKS[task]}.safetensors"), "--mixed_precision", "no"),
            *("--dataset_config", self.cache(task), "--learning_rate", 1e-2, "--seed", 1, "--max_train_steps", 2),
            *("--max_data_loader_n_workers", 0, "--sdpa", "--log_with", "none", "--output_dir", self.folder / "out"),
            *("--output_name", name, *more),
        ]

    def train(self, task: str, name: str, *more: object, dit: str = "", expect: int = 0) -> Weights:
        self.run_tool("wan_train_network.py", *self.training(task, name, *more, dit=dit), expect=expect)
        path = self.folder / "out" / f"{name}.safetensors"
        return load_file(path) if path.exists() else {}


@pytest.fixture(scope="module")
def desk(tiny: Path, tmp_path_factory: pytest.TempPathFactory, run_here: Tool) -> Desk:
    folder = tmp_path_factory.mktemp("control") / "all"
    shutil.copytree(tiny, folder)
    make_image_models(folder)
    make_control_models(folder)
    clips = sorted((folder / "clips").glob("*.mp4"))
    (folder / "controls").mkdir()
    (folder / "references").mkdir()
    for clip, other in zip(clips, clips[1:] + clips[:1], strict=True):
        shutil.copy(other, folder / "controls" / clip.name)
        Image.effect_noise((40, 40), 90).convert("RGB").save(folder / "references" / f"{clip.stem}.png")
    return Desk(folder, run_here)


@pytest.mark.parametrize("task", TASKS)
def test_a_lora_goes_on_to_the_bit(desk: Desk, task: str) -> None:
    convolutions = CONVOLUTIONS.get(OWN[task].partition(".")[0], ())
    options = ("--network_module", "networks.lora_wan", "--network_dim", 2, *convolutions)
    rates = {"fun-control-1.3B": 3, "vace-1.3B": 2, "fun-control-A14B": 3}.get(task, 0)
    names = ("--control_dropout_rate", "--reference_dropout_rate", "--image_dropout_rate")[:rates]
    dropping = [word for name in names for word in (name, 0.5)]
    whole = desk.train(task, f"{task}-whole", *options, *dropping)
    desk.train(task, f"{task}-parts", *options, *dropping, "--save_every_n_steps", 1, "--save_state")
    state = desk.folder / "out" / f"{task}-parts-step00000001-state"
    parts = desk.train(task, f"{task}-parts", *options, *dropping, "--resume", state)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    assert all(tensor.any() for key, tensor in whole.items() if "lora_up" in key)
    assert (f"lora_unet_{OWN[task].removesuffix('.weight').replace('.', '_')}.alpha" in whole) == bool(convolutions)
    if TASKS[task] == "vace":
        assert all(key.startswith("lora_unet_vace_blocks_0_") for key in whole) and not any("proj" in k for k in whole)


@pytest.mark.parametrize("task", TASKS)
def test_all_weights_go_on_to_the_bit(desk: Desk, task: str) -> None:
    options = ("--network_module", "networks.full")
    whole = desk.train(task, f"{task}-full", *options)
    desk.train(task, f"{task}-full-parts", *options, "--save_every_n_steps", 1, "--save_state")
    state = desk.folder / "out" / f"{task}-full-parts-step00000001-state"
    parts = desk.train(task, f"{task}-full-parts", *options, "--resume", state)
    before = load_file(desk.folder / f"{TASKS[task]}.safetensors")
    assert whole.keys() == before.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    assert not torch.equal(whole[OWN[task]], before[OWN[task]].float())


@pytest.mark.parametrize("task", ["vace-1.3B", "fun-camera-A14B"])
def test_a_plain_base_becomes_a_control_model(desk: Desk, task: str) -> None:
    """Its file then serves as --dit by itself, and a LoRA trained beside has a file of its own."""
    new = ("vace_*",) if task == "vace-1.3B" else ("control_adapter.*", "patch_embedding.*")
    options = ("--network_module", "networks.full", "--init_control", "auto", "--trainable", *new)
    made = desk.train(task, f"{task}-made", *options, "--train_also", "networks.lora_wan", dit=DIT)
    assert made[OWN[task]].shape == load_file(desk.folder / f"{TASKS[task]}.safetensors")[OWN[task]].shape
    assert torch.equal(made["blocks.0.ffn.0.weight"], load_file(desk.folder / DIT)["blocks.0.ffn.0.weight"].float())
    lora = load_file(desk.folder / "out" / f"{task}-made_lora.safetensors")
    assert all(key.startswith("lora_unet_blocks_") for key in lora)
    after = desk.train(task, f"{task}-more", "--network_module", "networks.full", dit=f"out/{task}-made.safetensors")
    assert after.keys() == made.keys() and not torch.equal(after[OWN[task]], made[OWN[task]])


def test_a_lora_trains_new_layers_too(desk: Desk) -> None:
    """As docs/control.md has it: the values of images in cross-attention are zeros, to which the LoRA adds."""
    task = "fun-control-1.3B"
    words = desk.training(task, "recipe", "--network_module", "networks.full", "--init_control", "auto", dit=DIT)
    desk.cache_latents(task, desk.data(task, CONTROLS))
    desk.cached.discard(task)
    trained = ("--trainable", "patch_embedding.*", "--train_also", "networks.lora_wan", "--network_dim", 2)
    desk.run_tool("wan_train_network.py", *words, *trained)
    lora = load_file(desk.folder / "out" / "recipe_lora.safetensors")
    assert "lora_unet_blocks_0_cross_attn_v_img.lora_up.weight" in lora
    desk.run_tool("wan_train_network.py", *words, *trained, "--network_args", "exclude_patterns=['.*v_img']", expect=2)


def test_new_layers_that_nothing_trains_are_refused(desk: Desk, capfd: pytest.CaptureFixture[str]) -> None:
    desk.train("vace-1.3B", "refused", "--init_control", "auto", dit=DIT, expect=2)
    told = capfd.readouterr().err
    assert "--init_control auto adds vace_blocks.0.before_proj.weight and 1 more weights that have no effect" in told
    assert (
        "--trainable vace_blocks.*.before_proj.* vace_blocks.*.after_proj.* and --train_also networks.lora_wan" in told
    )
    words = ("--network_module", "networks.full", "--init_control", "auto", "--trainable", "blocks.*")
    desk.train("vace-1.3B", "refused", *words, dit=DIT, expect=2)


def test_a_motion_controller_is_trained_and_read_by_itself(desk: Desk) -> None:
    task = "t2v-1.3B"
    alone = ("--network_module", "networks.full", "--trainable", "motion_controller.*")
    made = desk.train(task, "speed", *alone, "--init_control", "motion", "--ema_decay", 0.5, dit=DIT)
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == controller_shapes()
    assert made["linear.4.weight"].any()
    file = ("--motion_controller", desk.folder / "out" / "speed.safetensors")
    more = desk.train(task, "faster", *alone, *file, dit=DIT)
    assert more.keys() == made.keys() and not torch.equal(more["linear.4.weight"], made["linear.4.weight"])
    # A LoRA beside the frozen controller learns something else than beside another one.
    one = desk.train(task, "beside", *file, dit=DIT)
    other = ("--motion_controller", desk.folder / CONTROLLER)
    assert not all(torch.equal(one[key], tensor) for key, tensor in desk.train(task, "other", *other, dit=DIT).items())


def test_a_motion_controller_is_not_trained_on_clips_without_motion(
    desk: Desk, capfd: pytest.CaptureFixture[str]
) -> None:
    task = "t2v-1.3B"
    words = desk.training(task, "still", "--network_module", "networks.full", dit="speed.safetensors")
    desk.data(task, "")
    desk.cached.discard(task)
    desk.run_tool("wan_train_network.py", *words, "--trainable", "motion_controller.*", expect=2)
    told = " ".join(capfd.readouterr().err.split())
    assert "the motion controller is trained, and 3 of 3 clips have no motion_bucket_id" in told
    desk.run_tool("wan_train_network.py", *words, "--trainable", "blocks.*")


REFUSED = {
    "i2v-14B-FC": ("", "needs a control video, and no clip has one: give control_directory"),
    "vace-fun-A14B": ("", "needs a video, a mask or reference images, and no clip has any"),
    "t2v-1.3B": (DIT, f"3 of 3 clips have a motion_bucket_id, for which {DIT} has no weights"),
    "fun-control-1.3B": ("fun-control.safetensors", "3 of 3 clips have a reference image, for which fun-control"),
}


@pytest.mark.parametrize("task", REFUSED)
def test_data_that_a_model_does_not_fit_is_refused_with_a_way_out(
    desk: Desk, task: str, capfd: pytest.CaptureFixture[str]
) -> None:
    dit, told = REFUSED[task]
    words = desk.training(task, "refused", dit=dit)
    if not dit:  # the same clips without what controls them
        desk.cache_latents(task, desk.data(task, ""))
        desk.cached.discard(task)
    desk.run_tool("wan_train_network.py", *words, expect=2)
    assert told in " ".join(capfd.readouterr().err.split())


def test_trusted_caches_without_cameras_are_refused(desk: Desk, capfd: pytest.CaptureFixture[str]) -> None:
    words = desk.training("fun-inp-A14B", "refused", dit="fun-camera-A14B.safetensors")
    desk.run_tool("wan_train_network.py", *words, "--task", "fun-camera-A14B", "--trust_cache", expect=2)
    assert "needs a camera path, and 3 of 3 clips have none" in " ".join(capfd.readouterr().err.split())


def test_an_option_that_a_task_has_no_use_for_is_refused(desk: Desk, capfd: pytest.CaptureFixture[str]) -> None:
    desk.train("fun-camera-A14B", "refused", "--control_dropout_rate", 0.5, expect=2)
    desk.train("fun-camera-A14B", "refused", "--reference_dropout_rate", 0.5, expect=2)
    assert capfd.readouterr().err.count("leave it out") == 2


def test_another_controller_is_another_configuration(desk: Desk, capfd: pytest.CaptureFixture[str]) -> None:
    file = desk.folder / "mine.safetensors"
    save_file({name: draw_weight(f"mine {name}", shape) for name, shape in controller_shapes().items()}, file)
    task, options = "t2v-1.3B", ("--save_state", "--save_every_n_steps", 1)
    desk.train(task, "mine", "--motion_controller", file, *options, dit=DIT)
    state = desk.folder / "out" / "mine-step00000001-state"
    other = desk.folder / CONTROLLER
    desk.train(task, "mine", "--motion_controller", other, *options, "--resume", state, dit=DIT, expect=2)
    assert "--motion_controller was mine.safetensors" in capfd.readouterr().err
