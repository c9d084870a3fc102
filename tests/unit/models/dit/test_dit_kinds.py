"""Models are told by what they have: those that no task is for are refused by name, others lead to their task."""

import pytest
import torch
from torch import Tensor

from tests.parity.golden import load_manifest
from wan_train.errors import InputError
from wan_train.models.loading import check_dit
from wan_train.models.variants import VARIANTS
from wan_train.models.weights import diffusers_name

# Of each published control model the tasks that it is for, of whatever size.
CONTROL = ("fun-control-1.3B", "fun-control-14B", "i2v-14B-FC", "t2v-1.3B-FC", "t2v-14B-FC")
TASKS = {
    "wan2.1-fun-control-1.3B": CONTROL,
    "wan2.1-fun-control-14B": CONTROL,
    "wan2.1-fun-v1.1-control-1.3B": CONTROL,
    "wan2.1-fun-v1.1-control-14B": CONTROL,
    "wan2.1-fun-v1.1-control-camera-1.3B": ("fun-camera-1.3B", "fun-camera-14B"),
    "wan2.1-fun-v1.1-control-camera-14B": ("fun-camera-1.3B", "fun-camera-14B"),
    "wan2.1-vace-1.3B": ("vace-1.3B", "vace-14B", "vace-fun-A14B"),
    "wan2.1-vace-14B": ("vace-1.3B", "vace-14B", "vace-fun-A14B"),
    "wan2.2-fun-A14B-control": ("fun-control-A14B",),
}


def empty(shapes: dict[str, list[int]] | dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    with torch.device("meta"):
        return {name: torch.empty(tuple(shape), dtype=torch.bfloat16) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", list(TASKS))
def test_a_control_model_is_for_its_tasks_and_every_other_leads_to_them(name: str) -> None:
    state = empty(load_manifest(name))
    for task, variant in VARIANTS.items():
        if task in TASKS[name]:
            warning = check_dit(state, variant)
            assert (warning is None) == (
                name.rpartition("-")[2] in task or (variant.dim == 5120 and "1.3B" not in name)
            )
            continue
        with pytest.raises(InputError, match=f"use --task {TASKS[name][0].rpartition('-')[0]}") as refused:
            check_dit(state, variant)
        size = "1.3B" if "1.3B" in name else "14B"
        assert str(refused.value).endswith(size) and f"--task {variant.name} " in str(refused.value)


@pytest.mark.parametrize(
    ("removed", "told"),
    [
        ("vace_blocks.0.before_proj.weight", "missing vace_blocks.0.before_proj.weight"),
        ("vace_blocks.14.ffn.0.weight", "missing vace_blocks.14.ffn.0.weight"),
    ],
)
def test_a_control_model_that_lacks_a_part_is_not_whole(removed: str, told: str) -> None:
    shapes = load_manifest("wan2.1-vace-1.3B")
    with pytest.raises(InputError, match=told):
        check_dit(empty({name: shape for name, shape in shapes.items() if name != removed}), VARIANTS["vace-1.3B"])


@pytest.mark.parametrize(
    ("submodule", "kind"),
    [
        ("casual_audio_encoder.encoder.final_linear.weight", "S2V"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "Animate"),
    ],
)
def test_models_that_are_driven_by_sound_or_a_face_are_told_by_their_submodules(submodule: str, kind: str) -> None:
    base = load_manifest("wan2.1-t2v-1.3B") | {submodule: (8, 8)}
    with pytest.raises(InputError, match=f"is a {kind}"):
        check_dit(empty(base), VARIANTS["t2v-1.3B"])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_other_names_make_no_difference(prefix: str) -> None:
    vace = empty(load_manifest("wan2.1-vace-1.3B"))
    assert check_dit({prefix + name: tensor for name, tensor in vace.items()}, VARIANTS["vace-1.3B"]) is None
    theirs = {diffusers_name(name): tensor for name, tensor in vace.items()}
    assert "vace_blocks.3.attn1.to_q.weight" in theirs
    assert check_dit(theirs, VARIANTS["vace-1.3B"]) is None


@pytest.mark.parametrize(
    ("name", "task", "told"),
    [
        ("wan2.1-t2v-14B", "i2v-14B", "has 16 input channels, but --task i2v-14B requires 36: use --task t2v-14B"),
        ("wan2.1-i2v-14B", "t2v-14B", "has 36 input channels, but --task t2v-14B requires 16: use --task i2v-14B"),
        ("wan2.2-i2v-A14B", "t2v-14B", "has 36 input channels, but --task t2v-14B requires 16: use --task i2v-A14B"),
        ("wan2.2-i2v-A14B", "i2v-14B", "takes CLIP tokens of no image, .* provides one image: use --task i2v-A14B"),
        ("wan2.1-flf2v-14B", "i2v-14B", "takes CLIP tokens of a first and a last image, .* use --task flf2v-14B"),
        ("wan2.2-ti2v-5B", "t2v-1.3B", "has 48 input channels, but --task t2v-1.3B requires 16: use --task ti2v-5B"),
    ],
)
def test_a_model_of_another_task_leads_to_that_task(name: str, task: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        check_dit(empty(load_manifest(name)), VARIANTS[task])


def test_a_model_that_makes_other_channels_than_it_reads_is_not_of_the_task_for_those() -> None:
    shapes = load_manifest("wan2.2-ti2v-5B") | {"head.head.weight": (64, 3072), "head.head.bias": (64,)}
    with pytest.raises(InputError, match="has 16 output channels, but --task ti2v-5B requires 48: give another file"):
        check_dit(empty(shapes), VARIANTS["ti2v-5B"])
