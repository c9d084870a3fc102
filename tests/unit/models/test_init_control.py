"""New control layers beside a base: what they add at first is nothing, and everything of them can learn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny.control import controller_shapes
from tests.tiny.images import image_dit_shapes
from tests.tiny.make import Shapes, dit_shapes, draw_weight
from wan_train.assemble import ModelSettings, assemble_dit
from wan_train.errors import InputError
from wan_train.models.additions import extended_header, idle_weights
from wan_train.models.dit.dit import Dit
from wan_train.models.loading import check_dit, official_shapes, outline_dit
from wan_train.models.settings import DitSettings, InitSettings
from wan_train.models.variants import VARIANTS

CPU, DIM = torch.device("cpu"), 256


def base(folder: Path, shapes: Shapes, prefix: str = "") -> Path:
    path = folder / "base.safetensors"
    save_file({prefix + name: draw_weight(name, shape) for name, shape in shapes.items()}, path)
    return path


def settings(path: Path, task: str, kind: str | None, **more: Any) -> ModelSettings:
    return ModelSettings(DitSettings(task=task, dit=str(path), **more), init=InitSettings(init_control=kind))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def velocity(model: Dit, **inputs: Tensor) -> Tensor:
    """Of one sample: products over the text alone are then those of the base, whose rows follow each other."""
    latents, text = draw(1, 16, 3, 4, 6, seed=0), [draw(5, model.config.text_dim, seed=1)]
    out: Tensor = model(latents, torch.tensor([700.0]), text, **inputs)
    return out


CLIP = {"clip_features": draw(1, 257, 1280, seed=2)}
CONTROLS: dict[str, tuple[str, dict[str, Tensor]]] = {
    "fun-control-1.3B": ("auto", {"image_latents": draw(1, 32, 3, 4, 6, seed=3), **CLIP}),
    "fun-camera-1.3B": (
        "auto",
        {"image_latents": draw(1, 16, 3, 4, 6, seed=3), "camera": draw(1, 24, 3, 32, 48, seed=4), **CLIP},
    ),
    "vace-1.3B": ("auto", {"vace_context": draw(1, 96, 3, 4, 6, seed=5)}),
    "vace-fun-A14B": ("auto", {"vace_context": draw(1, 96, 3, 4, 6, seed=5)}),
    "fun-camera-A14B": (
        "auto",
        {"image_latents": draw(1, 20, 3, 4, 6, seed=3), "camera": draw(1, 24, 3, 32, 48, seed=4)},
    ),
    "fun-inp-A14B": ("auto", {"image_latents": draw(1, 20, 3, 4, 6, seed=3)}),
    "t2v-1.3B": ("motion", {"motion_bucket_id": torch.tensor([90])}),
}


@pytest.mark.parametrize("task", CONTROLS)
def test_the_first_step_is_the_bases_to_the_bit_whatever_the_controls(task: str, tmp_path: Path) -> None:
    kind, inputs = CONTROLS[task]
    path = base(tmp_path, dit_shapes(num_layers=3), prefix="model.diffusion_model.")
    plain = assemble_dit(settings(path, "t2v-1.3B", None), device=CPU)
    made = assemble_dit(settings(path, task, kind), device=CPU)
    assert torch.equal(velocity(made, **inputs), velocity(plain))


@pytest.mark.parametrize("task", [name for name in CONTROLS if name != "fun-inp-A14B"])
def test_all_that_is_idle_learns_and_then_controls(task: str, tmp_path: Path) -> None:
    """After two steps the controls change the result, so that no pair of zeros keeps a layer from its gradient."""
    kind, inputs = CONTROLS[task]
    path = base(tmp_path, dit_shapes(num_layers=3))
    own = settings(path, task, kind)
    model = assemble_dit(own, device=CPU).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (velocity(model, **inputs) - draw(1, 16, 3, 4, 6, seed=9)).square().mean().backward()
        optimizer.step()
    named = dict(model.named_parameters())
    assert all(named[name].any() for name in idle_weights(own.dit, own.init))
    with torch.no_grad():
        found = velocity(model, **inputs)
        for name, value in inputs.items():
            assert not torch.equal(velocity(model, **{**inputs, name: torch.zeros_like(value)}), found), name


def test_an_i2v_base_keeps_its_image_columns_and_mask(tmp_path: Path) -> None:
    """Wan2.2's Fun-Control reads I2V's mask and image behind the control, and a reference."""
    path = base(tmp_path, dit_shapes(in_dim=36))
    plain = assemble_dit(settings(path, "i2v-A14B", None), device=CPU)
    made = assemble_dit(settings(path, "fun-control-A14B", "auto"), device=CPU)
    weight = made.patch_embedding.weight
    assert torch.equal(weight[:, :16], plain.patch_embedding.weight[:, :16]) and not weight[:, 16:32].any()
    assert torch.equal(weight[:, 32:], plain.patch_embedding.weight[:, 16:])
    assert made.config.reference and not made.ref_conv.weight.any()


def test_an_i2v_base_of_wan21_gives_up_its_mask(tmp_path: Path) -> None:
    path = base(tmp_path, image_dit_shapes())
    plain = assemble_dit(settings(path, "i2v-14B", None), device=CPU)
    made = assemble_dit(settings(path, "fun-control-14B", "auto"), device=CPU)
    weight = made.patch_embedding.weight
    assert torch.equal(weight[:, 32:], plain.patch_embedding.weight[:, 20:]) and weight.shape[1] == 48
    assert torch.equal(made.img_emb.proj[1].weight, plain.img_emb.proj[1].weight)
    # Where the image's mask gives nothing the two agree.
    image = draw(1, 16, 3, 4, 6, seed=3)
    masked = torch.cat([torch.zeros(1, 4, 3, 4, 6), image], dim=1)
    behind = torch.cat([draw(1, 16, 3, 4, 6, seed=4), image], dim=1)
    given = {"clip_features": draw(1, 257, plain.config.image_dim, seed=2)}
    theirs = velocity(plain, image_latents=masked, **given)
    assert torch.allclose(velocity(made, image_latents=behind, **given), theirs, atol=1e-5)


def test_only_reference_adds_a_reference(tmp_path: Path) -> None:
    path = base(tmp_path, dit_shapes())
    for kind in ("auto", "reference"):
        made = assemble_dit(settings(path, "fun-control-1.3B", kind), device=CPU)
        assert made.config.reference == (kind == "reference")


@pytest.mark.parametrize(
    ("layers", "hinted"), [(3, (0, 2)), (30, tuple(range(0, 30, 2))), (40, tuple(range(0, 40, 5)))]
)
def test_vace_blocks_are_copies_of_those_that_they_hint_to(
    layers: int, hinted: tuple[int, ...], tmp_path: Path
) -> None:
    path = base(tmp_path, dit_shapes(dim=128, ffn_dim=128, num_layers=layers))
    made = assemble_dit(settings(path, "vace-1.3B", "auto"), device=CPU)
    assert made.config.vace_layers == hinted
    named = dict(made.named_parameters())
    for number, layer in enumerate(hinted):
        for leaf in ("modulation", "self_attn.q.weight", "ffn.2.bias"):
            assert torch.equal(named[f"vace_blocks.{number}.{leaf}"], named[f"blocks.{layer}.{leaf}"])


@pytest.mark.parametrize("task", ["fun-control-1.3B", "vace-1.3B", "fun-camera-14B"])
def test_the_whole_model_is_of_its_task_and_known_before_it_is_loaded(task: str, tmp_path: Path) -> None:
    own = settings(base(tmp_path, dit_shapes()), task, "auto")
    header = extended_header(own.dit, own.init)
    assert "width" in str(check_dit(own.dit.dit, VARIANTS[task], header=header))  # of another size, and no more
    with pytest.raises(InputError):
        check_dit(own.dit.dit, VARIANTS[task])
    outline = outline_dit(own.dit.dit, header=header)
    made = assemble_dit(own, device=CPU)
    wanted = {name: tuple(p.shape) for name, p in made.named_parameters()}
    assert official_shapes(header.shapes) == wanted == {n: tuple(p.shape) for n, p in outline.named_parameters()}


@pytest.mark.parametrize(
    ("shapes", "task", "kind", "told"),
    [
        (dit_shapes(), "t2v-1.3B", "auto", "has all layers of --task t2v-1.3B"),
        (dit_shapes(), "vace-1.3B", "reference", "takes no reference image: use auto"),
        (dit_shapes(in_dim=36), "vace-1.3B", "auto", "has 36 input channels"),
        (dit_shapes(in_dim=48), "fun-control-A14B", "auto", "has 48 input channels"),
        (image_dit_shapes(), "fun-control-A14B", "auto", "uses CLIP image tokens"),
        ({**dit_shapes(), "ref_conv.weight": (256, 16, 2, 2)}, "fun-control-1.3B", "auto", "already has ref_conv"),
    ],
)
def test_what_cannot_be_added_is_refused(shapes: Shapes, task: str, kind: str, told: str, tmp_path: Path) -> None:
    own = settings(base(tmp_path, shapes), task, kind)
    with pytest.raises(InputError, match=told):
        extended_header(own.dit, own.init)


@pytest.mark.parametrize("prefix", ["", "motion_controller.", "pipe.motion_controller."])
def test_a_motion_controller_of_its_own_file(prefix: str, tmp_path: Path) -> None:
    path = base(tmp_path, dit_shapes())
    file = tmp_path / "controller.safetensors"
    tensors = {name: draw_weight(name, shape) for name, shape in controller_shapes().items()}
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, file)
    made = assemble_dit(settings(path, "t2v-1.3B", None, motion_controller=str(file)), device=CPU)
    assert torch.equal(made.motion_controller.linear[4].weight, tensors["linear.4.weight"])
    plain = assemble_dit(settings(path, "t2v-1.3B", None), device=CPU)
    assert torch.equal(velocity(made), velocity(plain))
    slow, fast = (velocity(made, motion_bucket_id=torch.tensor([bucket])) for bucket in (5, 95))
    assert not torch.equal(slow, fast) and not torch.equal(slow, velocity(plain))


def test_a_wrong_controller_is_refused(tmp_path: Path) -> None:
    own = settings(base(tmp_path, dit_shapes()), "t2v-1.3B", None)
    file = tmp_path / "controller.safetensors"
    wrong: dict[str, Shapes] = {
        "is for a model of width 128": controller_shapes(128),
        "not a complete motion controller": {"linear.0.weight": (DIM, 256)},
        "is not a motion controller": {"proj.weight": (1, 1)},
    }
    for told, shapes in wrong.items():
        save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
        with pytest.raises(InputError, match=told):
            extended_header(replace(own.dit, motion_controller=str(file)))


@pytest.mark.parametrize(
    ("task", "kind", "told"),
    [
        (
            "vace-1.3B",
            None,
            "--motion_controller: --task vace-1.3B does not support a motion bucket: use a Wan2.1 t2v task",
        ),
        ("i2v-14B", None, "--motion_controller: --task i2v-14B does not support a motion bucket"),
        ("t2v-A14B", None, "--motion_controller: --task t2v-A14B does not support a motion bucket"),
        (
            "t2v-1.3B",
            "motion",
            "--init_control motion creates a motion controller, but one is given with --motion_controller",
        ),
    ],
)
def test_a_controller_without_use_is_refused(task: str, kind: str | None, told: str, tmp_path: Path) -> None:
    own = settings(base(tmp_path, dit_shapes()), task, kind)
    file = tmp_path / "controller.safetensors"
    save_file({name: draw_weight(name, shape) for name, shape in controller_shapes().items()}, file)
    with pytest.raises(InputError, match=told):
        extended_header(replace(own.dit, motion_controller=str(file)), own.init)
